"""Training progress, and lengths of training: "500 steps", "10M tokens", "15 min", "10%"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from nexus_core.errors import ConfigError, Hint, hint_value, suggestion
from nexus_core.signatures import Lax

__all__ = [
    "AMOUNT",
    "UNITS",
    "Every",
    "Exact",
    "Interval",
    "IntervalField",
    "Length",
    "TrainState",
    "within",
]

_ABSOLUTE = '"500 steps", "2 epochs", "10M tokens", "15 min"'
_EXAMPLES = f'{_ABSOLUTE}, or a share of the run, "10%"'
AMOUNT = r"(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d\d?)?"
"""A number of an interval, as a pattern."""
_FACTORS = {"k": 1_000, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
UNITS = {
    **{"": "steps", "step": "steps", "epoch": "epochs", "sample": "samples", "token": "tokens"},
    **dict.fromkeys(
        ("s", "sec", "second", "min", "minute", "h", "hr", "hour", "d", "day"), "seconds"
    ),
    **{"%": "%", "percent": "%"},
}
"""Names of units, in the singular, and what they are measured in."""
_SECONDS = {"min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600, "d": 86400, "day": 86400}
_KNOWN = "steps, epochs, samples, tokens (also with k, M or B in front), s, min, h, d, %"
_WHOLE = ("steps", "samples", "tokens")

Exact: TypeAlias = int | Fraction
"""An exact number; the quotient of two is rounded at most once."""


@dataclass
class TrainState:
    """The progress of a run. Only the engine writes it, after each step."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # passes over the data completed
    batch: int = 0  # micro-batches trained on in the current epoch: the data cursor
    epoch_length: int = 0  # micro-batches per epoch, 0 if unknown
    samples: int = 0  # rows trained on
    tokens: int = 0  # tokens trained on (rows, if a batch has no `input_ids`)
    seconds: float = 0.0  # time spent in the training loop, over all restarts
    evaluated_at: int = -1  # the step of the last evaluation

    @property
    def is_evaluated(self) -> bool:
        """Whether the current step has been evaluated."""
        return self.evaluated_at == self.step

    @property
    def epochs(self) -> float:
        """Epochs done, with the current one as a fraction if its length is known, to 9 digits."""
        return round(self.epoch + (self.batch / self.epoch_length if self.epoch_length else 0), 9)

    def counted(self, unit: str) -> float:
        """Progress in a unit: steps, epochs, samples, tokens or seconds."""
        if unit == "%":
            raise ConfigError("resolve a share of a run with `interval.of(engine.horizon)`")
        return self.step if unit == "steps" else float(getattr(self, unit))

    def exactly(self, unit: str) -> Exact:
        """The same without rounding, so that a share of a run agrees in every unit."""
        if unit == "epochs":
            part = Fraction(self.batch, self.epoch_length) if self.epoch_length else 0
            return self.epoch + part
        return Fraction(self.seconds) if unit == "seconds" else int(self.counted(unit))

    def a_step(self, unit: str) -> Fraction:
        """The mean amount of a unit per step so far; 0 before the first step."""
        return Fraction(self.exactly(unit)) / (self.step or 1)


@dataclass(frozen=True)
class Interval:
    """A length of training: an amount of steps, epochs, samples, tokens or seconds, or a share.

    A share of the run has the unit "%"; `of` converts it to the unit of the horizon.
    """

    amount: float
    unit: str

    def __post_init__(self) -> None:
        known = self.unit in UNITS.values()
        if not (known and 0 < self.amount < float("inf")):
            raise ConfigError(f"bad interval '{self.amount:g} {self.unit}'; expected {_EXAMPLES}")
        if self.unit == "%" and self.amount > 100:
            raise ConfigError(
                f"bad interval: {self} is more than the whole run; expected up to 100%"
            )

    @classmethod
    def parse(cls, value: Length) -> Interval:
        """Parse "500 steps", "1e3 steps", "1.5 epochs", "10M tokens", "8 h", "10%".

        A bare integer is steps, and a `timedelta` its seconds.

        Raises:
            ConfigError: it is not an amount and a unit.
        """
        if isinstance(value, Interval):
            return value
        if isinstance(value, timedelta):
            return cls(value.total_seconds(), "seconds")
        match = re.fullmatch(AMOUNT + r"\s*([a-zA-Z ]*|%)", str(value).strip(), re.ASCII)
        if match is None:
            raise ConfigError(
                "cannot read the interval ", hint_value(value), f"; expected {_EXAMPLES}"
            )
        digits, exponent, name = match.groups()
        amount = Decimal(digits.replace("_", "") + (exponent or ""))
        if _singular(name) not in UNITS:
            amount, name = amount * _FACTORS.get(name[0], 1), name[name[0] in _FACTORS :].strip()
        if (unit := UNITS.get(_singular(name))) is None:
            raise ConfigError(
                f"the interval {value!r} has the unknown unit '{name}'."
                f"{suggestion(name, [*_WHOLE, 'epochs', *_SECONDS, 'seconds'])} Known: {_KNOWN}"
            )
        if unit in _WHOLE and amount != amount.to_integral_value():
            raise ConfigError(f"bad interval: {value!r} is not a whole number of {unit}")
        return cls(float(amount * _SECONDS.get(_singular(name), 1)), unit)

    @classmethod
    def horizon(cls, value: Length | None) -> Interval:
        """Parse the length of a whole run.

        Raises:
            ConfigError: it is not an interval, or a share of one.
        """
        if not isinstance(value, Interval | timedelta | str | int | float):
            raise ConfigError(
                "the length of the run (until) is ", hint_value(value), f"; expected {_ABSOLUTE}",
                Hint("", ", as in fit(batches, '500 steps', eval_data=others)"),
            )  # fmt: skip
        horizon = cls.parse(value)
        if horizon.unit == "%":
            raise ConfigError(
                f"the length of the run (until) is {value!r}, a share of itself; "
                f"expected {_ABSOLUTE}"
            )
        return horizon

    @property
    def exact(self) -> Exact:
        """The amount as the decimal number written."""
        return int(self.amount) if self.amount % 1 == 0 else Fraction(str(self.amount))

    def of(self, horizon: Interval | None) -> Interval:
        """This length for a given horizon: a share is resolved, other lengths stay as they are.

        Raises:
            ConfigError: it is a share, and there is no horizon.
        """
        if self.unit != "%":
            return self
        if horizon is None:
            raise ConfigError(f"'{self}' is a share of a run, and there is no run to resolve it")
        return Interval(float(horizon.exact * self.exact / 100), horizon.unit)

    def progress(self, state: TrainState) -> float:
        """The fraction of this interval that is done, from 0 to 1."""
        return within(state.exactly(self.unit) / self.exact)

    def reached(self, state: TrainState) -> bool:
        """Whether the run has done at least this much."""
        return state.counted(self.unit) >= self.amount

    def __str__(self) -> str:
        minutes = self.unit == "seconds" and self.amount % 60 == 0
        amount, unit = (self.amount / 60, "min") if minutes else (self.amount, self.unit)
        return f"{Decimal(repr(amount)).normalize():f} {unit}".replace(" %", "%")


def within(share: float | Fraction) -> float:
    """A fraction, rounded once and clamped to [0, 1]."""
    return float(min(1, max(0, share)))


def _singular(name: str) -> str:
    """Normalize a unit name: "Epochs" and "epoch" are the same."""
    return name.lower() if len(name) < 2 else name.lower().removesuffix("s")


Length: TypeAlias = Interval | timedelta | str | int
"""Anything that can be parsed as an interval."""


class Every:
    """Reports once per period that it has passed since `state`; None: never.

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
        # rounded up slightly, so that three tenths of an epoch are three times one tenth
        return int(state.counted(interval.unit) / interval.amount + 1e-9) if interval else 0


IntervalField = Annotated[
    Lax[Interval],
    BeforeValidator(Interval.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "type": ["string", "integer"],
            "format": "interval",
            "examples": ["500 steps", "15 min", "10%"],
        }
    ),
]
"""The type of a config field for an interval: parsed from text, written as text."""
