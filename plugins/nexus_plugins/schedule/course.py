"""The course of a number over a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from nexus_core.intervals import Interval, IntervalField, within
from nexus_core.plugin import PluginConfig

if TYPE_CHECKING:
    from nexus_core.intervals import TrainState

__all__ = ["Course"]


class Course(PluginConfig):
    """Settings of a number that changes from one value to another over the run."""

    start: float = Field(description="value at the start, in the unit of the target")
    end: float = Field(description="value at the end")
    over: IntervalField = Field(default=Interval(100, "%"), description="length of the change")
    begin: IntervalField | None = Field(
        default=None, description="delay before the change; null: none"
    )
    shape: Literal["linear", "cosine", "exponential", "step"] = Field(
        default="linear",
        description="shape of the change; exponential: by equal factors; step: at its end",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.shape == "exponential" and not self.start * self.end > 0:
            raise ValueError("shape 'exponential' needs nonzero start and end of the same sign")
        if self.begin is not None and self.begin.unit != self.over.unit:
            raise ValueError(f"begin must be in {self.over.unit}, like over")
        return self

    def value(self, state: TrainState, horizon: Interval | None) -> float:
        """The current value: a pure function of progress."""
        over = self.over.of(horizon)
        done = state.exactly(over.unit) - (self.begin.of(horizon).exact if self.begin else 0)
        share = within(done / over.exact)
        if self.shape == "exponential":
            return self.start * math.pow(self.end / self.start, share)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        if self.shape == "step":
            share = float(share >= 1)
        return self.start + share * (self.end - self.start)
