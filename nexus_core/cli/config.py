"""The engine's own settings in a config file, beside one block per plugin."""

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

    seed: int = Field(0, description="of the generators, of the weights and of the data order")
    out: PathField | None = Field(None, description="run folder; null: runs/<name>-<time>")
    until: Annotated[IntervalField, BeforeValidator(Interval.horizon)] = Field(
        Interval.parse("1000 steps"), description="horizon: steps, epochs, samples, tokens or time"
    )
    accumulate: Annotated[int, WithJsonSchema(_ACCUMULATE)] = Field(
        1,
        ge=1,
        description="micro-batches in an optimizer step; auto: each batch is a step, split as "
        "memory asks, by an installed plugin that does so",
    )
    cells: int | None = Field(
        None,
        ge=1,
        description="cells that a step is computed in, one by one: its bits are then the same for "
        "any number of processes up to this, and however it is divided; null: whole micro-batches",
    )
    step_at_epoch_end: bool = Field(
        False,
        description="whether the last step of an epoch takes what is left of it alone, instead of "
        "micro-batches of the next epoch too",
    )
    device: str = Field("auto", description='"auto", "cpu", "cuda", "cuda:1", "mps"')
    log_every: IntervalField = Field(
        Interval.parse("10 steps"),
        description="period of the training metrics; a share: of the run",
    )
    eval_every: IntervalField | None = Field(None, description="period; null: at the end alone")
    plugins: dict[str, dict[str, Any]] = Field(
        {}, description="settings of each plugin, by its name"
    )
