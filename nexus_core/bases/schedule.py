"""The base classes of learning-rate schedules: warm-up, floor and checks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar

import torch
from pydantic import BeforeValidator, Field

from nexus_core.errors import ConfigError, hint_set
from nexus_core.intervals import Exact, Interval, IntervalField, within
from nexus_core.plugin import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.step import Step

__all__ = ["WARMUP", "Decay", "DecayConfig", "Schedule", "ScheduleConfig", "Warmup", "amount_in"]


def _none_for_zero(value: Any) -> Any:
    return None if re.fullmatch(r"0+(\.0*)?\s*([a-zA-Z]*|%)", str(value).strip()) else value


Warmup: TypeAlias = Annotated[IntervalField | None, BeforeValidator(_none_for_zero)]
"""The type of a warm-up's length; 0 disables it."""
WARMUP = "length of the linear warm-up from zero; 0 or null: none"


class ScheduleConfig(PluginConfig):
    """Settings shared by all schedules."""

    warmup: Warmup = Field(default=Interval(1, "%"), description=WARMUP)


class DecayConfig(ScheduleConfig):
    """Settings shared by schedules that decay."""

    min_lr: float = Field(
        default=1e-5,
        ge=0,
        description="final learning rate of the first parameter group; the others keep their "
        "ratio to it",
    )


ScheduleConfigT = TypeVar("ScheduleConfigT", bound=ScheduleConfig)
DecayConfigT = TypeVar("DecayConfigT", bound=DecayConfig)


class Schedule(Plugin[ScheduleConfigT]):
    """A learning rate that is a pure function of the run's progress: warm-up times `scale`.

    A warm-up of n steps starts at `1 / n`, so that the first step has an effect, in whatever unit
    its length is given; in seconds it starts at zero, since none have passed.
    """

    slot: ClassVar[str | None] = "lr"
    _first: Mapping[str, float] = MappingProxyType({})  # size of the run's first step

    def scale(self, engine: Engine) -> float:
        """The current factor of the base learning rate, without the warm-up."""
        raise NotImplementedError(f"{type(self).__name__}.scale")

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Reject a warm-up longer than the run.

        Raises:
            ConfigError: the warm-up is longer than the horizon.
        """
        warmup, horizon = self.config.warmup, engine.horizon
        if warmup is None or horizon is None:
            return
        amount = amount_in(horizon.unit, warmup, engine)
        if amount is not None and amount > horizon.exact:
            raise ConfigError(
                f"{self.name}.warmup is {warmup}, longer than the whole run of {horizon}, so the "
                "learning rate would never reach its base; give it as a share, for instance ",
                hint_set(f"{self.name}.warmup", "10%"),
                ", shorten it, or train longer",
            )

    @hookimpl
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Measure the first step, for lengths in samples and tokens."""
        if engine.state.step == 0:
            size = engine.ranks.sum(torch.tensor(step.size(), dtype=torch.double)).tolist()
            self._first = dict(zip(("samples", "tokens"), size, strict=True))

    @hookimpl
    def lr_scale(self, engine: Engine) -> float:
        """The current factor of the base learning rate."""
        if self.config.warmup is None:
            return self.scale(engine)
        warmup = self.config.warmup.of(engine.horizon)
        done = engine.state.exactly(warmup.unit) + self._a_step(warmup.unit, engine)
        return within(done / warmup.exact) * self.scale(engine)

    def after_warmup(self, engine: Engine, end: Interval) -> float:
        """The progress, from 0 to 1, between the end of the warm-up and `end`.

        If the warm-up cannot be converted to the unit of `end` (1000 steps of 10M tokens), progress
        is measured from the start of the run, and the warm-up multiplies its beginning.
        """
        warmup = self.config.warmup
        start = (amount_in(end.unit, warmup, engine) if warmup else None) or 0
        done = engine.state.exactly(end.unit)
        if end.exact <= start:
            return float(end.reached(engine.state))
        return within((done - start) / (end.exact - start))

    def _a_step(self, unit: str, engine: Engine) -> Exact:
        """The size of a step in a unit: the mean of past steps, or the size of the first one."""
        known = 1 if unit == "steps" else amount_in(unit, Interval(1, "steps"), engine)
        if known is not None:
            return known
        first = None if engine.state.step else self._first.get(unit)
        return engine.state.a_step(unit) if first is None else Fraction(first)


class Decay(Schedule[DecayConfigT]):
    """A schedule that decays from the base learning rate to `min_lr` at the horizon."""

    def shape(self, done: float) -> float:
        """The factor, from 1 to 0, after a share `done` of the decay."""
        raise NotImplementedError(f"{type(self).__name__}.shape")

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Reject a warm-up longer than the run, and a floor above the base learning rate.

        Raises:
            ConfigError: either is the case.
        """
        super().on_start(engine)
        if self.floor(engine) > 1:
            lower = float(f"{_base(engine) / 10:g}")
            raise ConfigError(
                f"{self.name}.min_lr is {self.config.min_lr:g}, above the optimizer's learning "
                f"rate of {_base(engine):g} that it decays from; lower it, for instance ",
                hint_set(f"{self.name}.min_lr", lower),
                ", or raise the learning rate",
            )

    def floor(self, engine: Engine) -> float:
        """`min_lr` as a share of the base learning rate."""
        return self.config.min_lr / base if (base := _base(engine)) else 0.0

    def scale(self, engine: Engine) -> float:
        """The current factor of the base learning rate, without the warm-up."""
        if engine.horizon is None:
            return 1.0
        floor = self.floor(engine)
        return floor + (1 - floor) * self.shape(self.after_warmup(engine, engine.horizon))


def amount_in(unit: str, interval: Interval, engine: Engine) -> Exact | None:
    """An interval's exact amount in another unit, or None if it cannot be converted.

    Steps and epochs are converted if the length of an epoch is known; a share of the run is
    resolved with its horizon.
    """
    interval = interval.of(engine.horizon)
    if interval.unit == unit:
        return interval.exact
    steps_an_epoch = Fraction(engine.state.epoch_length, engine.accumulate)
    if engine.step_at_epoch_end:
        steps_an_epoch = Fraction(math.ceil(steps_an_epoch))
    if steps_an_epoch and {interval.unit, unit} == {"steps", "epochs"}:
        return interval.exact * (steps_an_epoch if unit == "steps" else 1 / steps_an_epoch)
    return None


def _base(engine: Engine) -> float:
    return float(engine.optimizer.param_groups[0]["initial_lr"])
