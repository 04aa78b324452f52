"""What every learning-rate schedule shares: the warm-up, the floor, and what cannot be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field

from nexus_core.errors import ConfigError, hint_set
from nexus_core.intervals import Interval, IntervalField
from nexus_core.plugin import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Decay", "DecayConfig", "Schedule", "ScheduleConfig", "amount_in"]


def _none_for_zero(value: Any) -> Any:
    return None if str(value).split(maxsplit=1)[:1] == ["0"] else value


class ScheduleConfig(PluginConfig):
    """Settings that every schedule has."""

    warmup: Annotated[IntervalField | None, BeforeValidator(_none_for_zero)] = Field(
        Interval(1000, "steps"),
        description="length of the linear rise from zero at the start; 0 or null: none",
    )


class DecayConfig(ScheduleConfig):
    """Settings of the schedules that come down again."""

    min_lr: float = Field(
        1e-5,
        ge=0,
        description="learning rate at the end, of the first parameter group; the others keep "
        "their ratio to it",
    )


ScheduleConfigT = TypeVar("ScheduleConfigT", bound=ScheduleConfig)
DecayConfigT = TypeVar("DecayConfigT", bound=DecayConfig)


class Schedule(Plugin[ScheduleConfigT]):
    """A learning rate that is a pure function of how far the run is: warm-up times `scale`.

    A warm-up in steps, or in epochs of a known length, is at `1 / n` in the first of n steps, so
    that no step is without effect; in tokens, samples or seconds it starts from zero, as none have
    passed.
    """

    slot: ClassVar[str | None] = "lr"

    def scale(self, engine: Engine) -> float:
        """The factor of the base learning rate now, apart from the warm-up."""
        raise NotImplementedError(f"{type(self).__name__}.scale")

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Refuse a warm-up that the run would end in.

        Raises:
            ConfigError: it is longer than the horizon.
        """
        warmup, horizon = self.config.warmup, engine.horizon
        if warmup is None or horizon is None:
            return
        amount = amount_in(horizon.unit, warmup, engine)
        if amount is not None and amount > horizon.amount:
            shorter = Interval(_tenth(horizon), horizon.unit)
            raise ConfigError(
                f"{self.name}.warmup is {warmup}, longer than the whole run of {horizon}, so the "
                "learning rate would never get to its base; shorten it, for instance "
                f"{hint_set(f'{self.name}.warmup', shorter)}, or train longer"
            )

    @hookimpl
    def lr_scale(self, engine: Engine) -> float:
        """The factor of the base learning rate now."""
        warmup = self.config.warmup
        if warmup is None:
            return self.scale(engine)
        a_step = amount_in(warmup.unit, Interval(1, "steps"), engine) or 0.0
        done = engine.state.counted(warmup.unit) + a_step
        return min(1.0, done / warmup.amount) * self.scale(engine)

    def after_warmup(self, engine: Engine, end: Interval) -> float:
        """The share done, from 0 to 1, of what lies between the end of the warm-up and `end`.

        Where the warm-up cannot be told in the unit of `end` (1000 steps of 10M tokens), the
        whole way to `end` counts, and the warm-up multiplies the beginning of it.
        """
        start = 0.0
        if self.config.warmup is not None:
            start = amount_in(end.unit, self.config.warmup, engine) or 0.0
        done, amount, state = engine.state.counted(end.unit), end.amount, engine.state
        if end.unit == "epochs" and state.epoch_length:  # in whole batches: exact, as in steps
            done = state.epoch * state.epoch_length + state.batch
            start, amount = (round(n * state.epoch_length, 6) for n in (start, amount))
        if amount <= start:
            return float(end.reached(engine.state))
        return min(1.0, max(0.0, (done - start) / (amount - start)))


class Decay(Schedule[DecayConfigT]):
    """A schedule that falls from the base learning rate to `min_lr` at the horizon."""

    def shape(self, done: float) -> float:
        """The height, from 1 to 0, where a share `done` of the decay is over."""
        raise NotImplementedError(f"{type(self).__name__}.shape")

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Refuse a warm-up that the run would end in, and a floor above the base.

        Raises:
            ConfigError: one or the other.
        """
        super().on_start(engine)
        if self.floor(engine) > 1:
            lower = float(f"{_base(engine) / 10:g}")
            raise ConfigError(
                f"{self.name}.min_lr is {self.config.min_lr:g}, above the optimizer's learning "
                f"rate of {_base(engine):g} that it should fall from; lower it, for instance "
                f"{hint_set(f'{self.name}.min_lr', lower)}, or raise the learning rate"
            )

    def floor(self, engine: Engine) -> float:
        """`min_lr` as a share of the base learning rate."""
        return self.config.min_lr / base if (base := _base(engine)) else 0.0

    def scale(self, engine: Engine) -> float:
        """The factor of the base learning rate now, apart from the warm-up."""
        if engine.horizon is None:
            return 1.0
        floor = self.floor(engine)
        return floor + (1 - floor) * self.shape(self.after_warmup(engine, engine.horizon))


def amount_in(unit: str, interval: Interval, engine: Engine) -> float | None:
    """An interval's amount in another unit, or None where that cannot be known.

    Steps and epochs turn into one another where the data says how long an epoch is.
    """
    if interval.unit == unit:
        return interval.amount
    steps_an_epoch = engine.state.epoch_length / engine.accumulate
    if engine.step_at_epoch_end:
        steps_an_epoch = math.ceil(steps_an_epoch)
    if steps_an_epoch and {interval.unit, unit} == {"steps", "epochs"}:
        return interval.amount * (steps_an_epoch if unit == "steps" else 1 / steps_an_epoch)
    return None


def _base(engine: Engine) -> float:
    return float(engine.optimizer.param_groups[0]["initial_lr"])


def _tenth(horizon: Interval) -> float:
    whole = horizon.unit in ("steps", "samples", "tokens")
    return max(1.0, horizon.amount // 10) if whole else horizon.amount / 10
