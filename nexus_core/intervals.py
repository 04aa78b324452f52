"""How far a run is, and lengths of training: "500 steps", "10M tokens", "15 min", "10%" of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from nexus_core.errors import ConfigError

__all__ = [
    "Every",
    "Exact",
    "Interval",
    "IntervalField",
    "Length",
    "Result",
    "TrainState",
    "within",
]

_ABSOLUTE = '"500 steps", "2 epochs", "10M tokens", "15 min"'
_EXAMPLES = f'{_ABSOLUTE}, or a share of the run, "10%"'
_AMOUNT = re.compile(r"(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d\d?)?\s*([a-zA-Z ]*|%)", re.ASCII)
_FACTORS = {"k": 1_000, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
_UNITS = {
    **{"": "steps", "step": "steps", "epoch": "epochs", "sample": "samples", "token": "tokens"},
    **dict.fromkeys(
        ("s", "sec", "second", "min", "minute", "h", "hr", "hour", "d", "day"), "seconds"
    ),
    **{"%": "%", "percent": "%"},
}
_SECONDS = {"min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600, "d": 86400, "day": 86400}
_KNOWN = "steps, epochs, samples, tokens (with k, M or B before them), s, min, h, d, %"
_WHOLE = ("steps", "samples", "tokens")

Exact: TypeAlias = int | Fraction
"""A number without rounding; the quotient of two is rounded once, or not at all."""


@dataclass
class TrainState:
    """How far a run is. The engine alone writes it, when a step is done; all else reads it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # passes over the data completed
    batch: int = 0  # micro-batches trained on within the present epoch: the data cursor
    epoch_length: int = 0  # micro-batches in an epoch, 0 while that is not known
    samples: int = 0  # rows trained on
    tokens: int = 0  # tokens trained on (rows, where a batch holds no `input_ids`)
    seconds: float = 0.0  # time spent in the training loop, over all restarts
    evaluated_at: int = -1  # the step of the last evaluation

    @property
    def is_evaluated(self) -> bool:
        """Whether there has been an evaluation at the present step."""
        return self.evaluated_at == self.step

    @property
    def epochs(self) -> float:
        """Epochs done, the present one as a fraction where its length is known, to 9 digits."""
        return round(self.epoch + (self.batch / self.epoch_length if self.epoch_length else 0), 9)

    def counted(self, unit: str) -> float:
        """The amount done of a unit: steps, epochs, samples, tokens or seconds."""
        if unit == "%":
            raise ConfigError("a share of a run is counted by `interval.of(engine.horizon)`")
        return self.step if unit == "steps" else float(getattr(self, unit))

    def exactly(self, unit: str) -> Exact:
        """The same without rounding, so that a share of a run is the same in every unit."""
        if unit == "epochs":
            part = Fraction(self.batch, self.epoch_length) if self.epoch_length else 0
            return self.epoch + part
        return Fraction(self.seconds) if unit == "seconds" else int(self.counted(unit))

    def a_step(self, unit: str) -> Fraction:
        """What a step held of a unit, in the mean of those done; 0 before the first."""
        return Fraction(self.exactly(unit)) / (self.step or 1)


@dataclass(frozen=True)
class Result:
    """How a run ended: "finished", or "stopped" early for a reason; the last of every metric.

    A run whose last evaluation was given up is "stopped": resumed, it makes it.
    """

    status: str
    reason: str
    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]

    @classmethod
    def of(
        cls,
        state: TrainState,
        horizon: Interval | None,
        reason: str | None,
        metrics: Mapping[str, float],
        owed: bool,
    ) -> Result:
        """How a run ended whose counters, horizon, reason to stop and metrics these are.

        Args:
            owed: an evaluation was given up.
        """
        done = horizon is not None and horizon.reached(state) and not owed
        status = "finished" if done else "stopped"
        return cls(status, reason or "", state.step, state.tokens, state.seconds, dict(metrics))


@dataclass(frozen=True)
class Interval:
    """A length of training: an amount of steps, epochs, samples, tokens or seconds, or a share.

    A share of the run has the unit "%", and is a length in the unit of a horizon by `of`.
    """

    amount: float
    unit: str

    def __post_init__(self) -> None:
        known = self.unit in _UNITS.values()
        if not (known and 0 < self.amount < float("inf")):
            raise ConfigError(f"no interval: {self.amount:g} {self.unit}; expected {_EXAMPLES}")
        if self.unit == "%" and self.amount > 100:
            raise ConfigError(
                f"no interval: {self} is more than the whole run; expected up to 100%"
            )

    @classmethod
    def parse(cls, value: Length) -> Interval:
        """Read "500 steps", "1e3 steps", "1.5 epochs", "10M tokens", "8 h", "10%".

        A bare whole number is steps, and a `timedelta` its seconds.

        Raises:
            ConfigError: it is not an amount and a unit.
        """
        if isinstance(value, Interval):
            return value
        if isinstance(value, timedelta):
            return cls(value.total_seconds(), "seconds")
        match = _AMOUNT.fullmatch(str(value).strip())
        if match is None:
            raise ConfigError(f"cannot read the interval {value!r}; expected {_EXAMPLES}")
        digits, exponent, name = match.groups()
        amount = Decimal(digits.replace("_", "") + (exponent or ""))
        if _singular(name) not in _UNITS:
            amount, name = amount * _FACTORS.get(name[0], 1), name[name[0] in _FACTORS :].strip()
        if (unit := _UNITS.get(_singular(name))) is None:
            raise ConfigError(
                f"the interval {value!r} has the unknown unit '{name}'; known units: {_KNOWN}"
            )
        if unit in _WHOLE and amount != amount.to_integral_value():
            raise ConfigError(f"no interval: {value!r} is not a whole number of {unit}")
        return cls(float(amount * _SECONDS.get(_singular(name), 1)), unit)

    @classmethod
    def horizon(cls, value: Length | None) -> Interval:
        """Read the length of a whole run.

        Raises:
            ConfigError: it is not an interval, or a share of one.
        """
        if value is None:
            raise ConfigError(
                f"until says how long to train, and is not given; expected {_ABSOLUTE}"
            )
        horizon = cls.parse(value)
        if horizon.unit == "%":
            raise ConfigError(f"until is '{horizon}', a share of itself; expected {_ABSOLUTE}")
        return horizon

    @property
    def exact(self) -> Exact:
        """The amount as the decimal number that was written."""
        return int(self.amount) if self.amount % 1 == 0 else Fraction(str(self.amount))

    def of(self, horizon: Interval | None) -> Interval:
        """This length in a run with a horizon: of a share, the part of it; others are themselves.

        Raises:
            ConfigError: it is a share, and there is no horizon.
        """
        if self.unit != "%":
            return self
        if horizon is None:
            raise ConfigError(f"'{self}' is a share of a run, and there is no run that it is of")
        return Interval(float(horizon.exact * self.exact / 100), horizon.unit)

    def progress(self, state: TrainState) -> float:
        """The share of this interval that is done, from 0 to 1."""
        return within(state.exactly(self.unit) / self.exact)

    def reached(self, state: TrainState) -> bool:
        """Whether the run has done at least this much."""
        return state.counted(self.unit) >= self.amount

    def __str__(self) -> str:
        minutes = self.unit == "seconds" and self.amount % 60 == 0
        amount, unit = (self.amount / 60, "min") if minutes else (self.amount, self.unit)
        return f"{Decimal(repr(amount)).normalize():f} {unit}".replace(" %", "%")


def within(share: float | Fraction) -> float:
    """A share, rounded once; 0 and 1 where it is beyond them."""
    return float(min(1, max(0, share)))


def _singular(name: str) -> str:
    """How a unit is looked up: "Epochs" and "epoch" are one."""
    return name.lower() if len(name) < 2 else name.lower().removesuffix("s")


Length: TypeAlias = Interval | timedelta | str | int
"""What is read as an interval."""


class Every:
    """Tells once per period that it has passed since the counters were `state`; None: never.

    A period that may be a share is resolved first: `Every(period.of(engine.horizon), ...)`.
    """

    def __init__(self, interval: Interval | None, state: TrainState) -> None:
        self._interval = interval
        self._passed = self._periods(state)

    def due(self, state: TrainState) -> bool:
        """Whether another period has been completed since the last call that said so."""
        before, self._passed = self._passed, self._periods(state)
        return self._passed != before

    def _periods(self, state: TrainState) -> int:
        interval = self._interval
        # rounded up by a hair: three tenths of an epoch are three times a tenth of one
        return int(state.counted(interval.unit) / interval.amount + 1e-9) if interval else 0


IntervalField = Annotated[
    Interval,
    BeforeValidator(Interval.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["500 steps", "15 min", "10%"]}),
]
"""The type of a config field that holds an interval: read from text, written as text."""
