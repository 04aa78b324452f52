"""Trains on short sequences first."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from nexus_core import (
    ConfigError,
    DataError,
    Interval,
    IntervalField,
    Plugin,
    PluginConfig,
    TrainState,
    hookimpl,
)
from nexus_core.signatures import Several

if TYPE_CHECKING:
    from typing import Self

    from nexus_core import Engine

__all__ = ["CurriculumConfig", "CurriculumPlugin"]


class CurriculumConfig(PluginConfig):
    """Settings of the sequence-length curriculum."""

    start_length: int = Field(default=256, ge=1, description="tokens per row at the start")
    end_length: int = Field(default=2048, ge=1, description="tokens per row at the end")
    warmup: IntervalField = Field(
        default=Interval(10, "%"), description="length of training over which rows grow"
    )
    round_to: int = Field(default=64, ge=1, description="round lengths down to a multiple of this")
    shape: Literal["linear", "sqrt", "step"] = Field(
        default="linear",
        description="how the length grows: linearly, fast at first (sqrt), or by the table (step)",
    )
    table: Several[tuple[float, int]] = Field(
        default=(),
        description="for shape step: pairs [share of the warmup done, length from then on]",
    )
    mode: Literal["reshape", "truncate"] = Field(
        default="reshape",
        description="reshape: cut rows into shorter rows, keeping every token; truncate: drop the "
        "rest of each row",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.start_length > self.end_length:
            raise ValueError(f"start_length is above end_length, {self.end_length}")
        if (self.shape == "step") is not bool(self.table):
            raise ValueError("shape 'step' needs a table such as [[0, 256], [0.5, 512]]")
        if list(self.table) != sorted(self.table):
            raise ValueError("the table must be sorted by share of the warmup")
        return self


class CurriculumPlugin(Plugin[CurriculumConfig]):
    """Trains on short rows first and lengthens them on a schedule, up to their full length.

    Every tensor of the batch that has a column for each of the `input_ids` `(batch, time)` is
    shortened with them: labels, masks, segments, positions. In the mode `reshape` a row becomes
    several, and per-row entries are repeated; rows are split evenly, so the length is the largest
    divisor of the data's row length that does not exceed the scheduled one. Tokens per step, and so
    intervals in tokens, stay the same; the number of rows (samples) changes. Evaluation is not
    affected. `curriculum/seq_len` is logged.

    Source: Li et al. 2022, "The Stability-Efficiency Dilemma: Investigating Sequence Length
    Warmup for Training GPT Models", which truncates; cutting instead of dropping is ours.
    """

    config_class = CurriculumConfig
    _length: int | None = None

    @hookimpl
    def on_batch(self, engine: Engine, batch: MutableMapping[str, Tensor]) -> None:
        """Shorten the rows of a micro-batch in place.

        Raises:
            DataError: the batch holds no `input_ids` `(batch, time)`.
            ConfigError: its rows cannot be cut evenly.
        """
        ids = batch.get("input_ids") if isinstance(batch, MutableMapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise DataError("curriculum needs batches with 'input_ids' of shape (batch, time)")
        rows, time = ids.shape
        length = min(self.length(engine.state, engine.horizon), time)
        if self.config.mode == "reshape":
            length = _even_cut(time, length, self.config.round_to)
        self._length = length
        if length == time:
            return
        for name, value in batch.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
                continue
            by_token = [place for place in range(1, value.ndim) if value.shape[place] == time]
            if self.config.mode == "truncate":
                for place in by_token:
                    value = value.narrow(place, 0, length)
                batch[name] = value
            elif by_token == [1]:
                batch[name] = value.reshape(rows * (time // length), length, *value.shape[2:])
            elif not by_token:
                batch[name] = value.repeat_interleave(time // length, dim=0)
            else:
                raise DataError(
                    f"curriculum: '{name}' of shape {tuple(value.shape)} has tokens outside "
                    "its second dimension, so its rows cannot be cut; set curriculum.mode to "
                    "truncate, or let the model build the mask"
                )

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The current length."""
        return {} if self._length is None else {"curriculum/seq_len": float(self._length)}

    def length(self, state: TrainState, horizon: Interval | None = None) -> int:
        """The scheduled length in tokens, a pure function of progress."""
        config = self.config
        done = config.warmup.of(horizon).progress(state)
        if config.shape == "step":
            passed = [length for share, length in config.table if share <= done]
            wanted = passed[-1] if passed else config.start_length
        else:
            share = done if config.shape == "linear" else math.sqrt(done)
            wanted = int(config.start_length + share * (config.end_length - config.start_length))
        return max(wanted // config.round_to * config.round_to, min(wanted, config.round_to))


def _even_cut(time: int, length: int, round_to: int) -> int:
    """The greatest divisor of `time` up to `length`, a multiple of `round_to` if one is near."""
    divisors = [d for d in range(1, length + 1) if time % d == 0]
    best = max((d for d in divisors if d % round_to == 0), default=0)
    best = best if 2 * best > length else divisors[-1]
    if 2 * best <= length < time:
        raise ConfigError(
            f"curriculum: rows of {time} tokens cannot be cut evenly into rows of about {length} "
            f"(the nearest divisor is {best}); use a sequence length with many divisors, such as a "
            "power of two, or curriculum.mode=truncate"
        )
    return best
