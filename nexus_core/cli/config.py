"""The engine's own settings in a config file, next to one block per plugin."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from nexus_core.intervals import Interval, IntervalField
from nexus_core.paths import PathField

__all__ = ["RunConfig"]

_ACCUMULATE = {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}


class RunConfig(BaseModel):
    """The engine's own settings, and one block per plugin."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    seed: int = Field(
        default=0, description="seed of the generators, the weights and the data order"
    )
    out: PathField | None = Field(default=None, description="run folder; null: runs/<name>-<time>")
    until: Annotated[IntervalField, BeforeValidator(Interval.horizon)] = Field(
        default=Interval.parse("1000 steps"),
        description="horizon: steps, epochs, samples, tokens or time",
    )
    accumulate: Annotated[int, WithJsonSchema(_ACCUMULATE)] = Field(
        default=1,
        ge=1,
        description="micro-batches per optimizer step; auto: each batch is a step, split to fit "
        "memory by an installed plugin that can",
    )
    cells: int | None = Field(
        default=None,
        ge=1,
        description="number of cells that a step is computed in, one at a time: results are then "
        "bitwise identical on up to this many processes; null: whole micro-batches",
    )
    step_at_epoch_end: bool = Field(
        default=False,
        description="end the last step of an epoch with what is left of it, instead of filling it "
        "up with micro-batches of the next epoch",
    )
    device: str = Field(default="auto", description='"auto", "cpu", "cuda", "cuda:1", "mps"')
    log_every: IntervalField = Field(
        default=Interval.parse("10 steps"),
        description="interval between training metrics; a share is of the run",
    )
    eval_every: IntervalField | None = Field(
        default=None, description="interval; null: only at the end"
    )
    plugins: dict[str, dict[str, Any]] = Field(
        default={}, description="each plugin's settings, by its name"
    )
