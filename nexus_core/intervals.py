"""Lengths and periods of training: "500 steps", "2 epochs", "10M tokens", "15 min"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from nexus_core.errors import ConfigError
from nexus_core.state import TrainState

__all__ = ["Every", "Interval", "IntervalField"]

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
_UNITS = {
    "step": ("steps", 1.0),
    "epoch": ("epochs", 1.0),
    "sample": ("samples", 1.0),
    "token": ("tokens", 1.0),
    "s": ("seconds", 1.0),
    "sec": ("seconds", 1.0),
    "second": ("seconds", 1.0),
    "min": ("seconds", 60.0),
    "minute": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    "hour": ("seconds", 3600.0),
    "d": ("seconds", 86400.0),
    "day": ("seconds", 86400.0),
}
_PATTERN = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([kmbg]?)\s*([a-z]*)\s*", re.IGNORECASE)
_EXAMPLES = '"500 steps", "2 epochs", "10M tokens", "15 min"'


@dataclass(frozen=True)
class Interval:
    """A length of training: a positive amount of one unit.

    Args:
        amount: how many units, positive.
        unit: "steps", "epochs", "samples", "tokens" or "seconds".
    """

    amount: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in {unit for unit, _ in _UNITS.values()}:
            raise ConfigError(f"unknown unit '{self.unit}'; expected for instance {_EXAMPLES}")
        if not 0 < self.amount < float("inf"):
            raise ConfigError(f"an interval must be positive, got {self.amount:g} {self.unit}")
        if self.unit in ("steps", "samples", "tokens") and self.amount != int(self.amount):
            raise ConfigError(f"an interval in {self.unit} must be whole, got {self.amount:g}")

    @classmethod
    def parse(cls, value: Interval | str | int) -> Interval:
        """Read "500 steps", "1.5 epochs", "10M tokens", "15 min"; a bare whole number is steps.

        Raises:
            ConfigError: the text is not an amount and a unit.
        """
        if isinstance(value, Interval):
            return value
        match = _PATTERN.fullmatch(str(value)) if not isinstance(value, bool) else None
        if match is None:
            raise ConfigError(f"cannot read the interval {value!r}; expected {_EXAMPLES}")
        number, scale, name = match.group(1), match.group(2).lower(), match.group(3).lower()
        if scale + name in _UNITS:  # "m" of "min", "b" and "g" never start a unit
            scale, name = "", scale + name
        unit = _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) if name else ("steps", 1.0)
        if unit is None:
            raise ConfigError(f"unknown unit in the interval {value!r}; expected {_EXAMPLES}")
        return cls(float(number.replace("_", "")) * _SCALES[scale] * unit[1], unit[0])

    def count(self, state: TrainState) -> float:
        """How many of this interval's unit the run has done."""
        return state.counted(self.unit)

    def progress(self, state: TrainState) -> float:
        """The share of this interval that is done, from 0 to 1."""
        return min(1.0, self.count(state) / self.amount)

    def reached(self, state: TrainState) -> bool:
        """Whether the run has done at least this much."""
        return self.count(state) >= self.amount

    def __str__(self) -> str:
        if self.unit == "seconds" and self.amount >= 60:
            return f"{self.amount / 60:.10g} min"
        return f"{self.amount:.10g} {self.unit}"


class Every:
    """Tells once per period that the period has passed.

    Args:
        interval: the period, or None for never.
        state: the counters now; a period that had passed before is not told again.
    """

    def __init__(self, interval: Interval | None, state: TrainState) -> None:
        self._interval = interval
        self._passed = self._periods(state)

    def due(self, state: TrainState) -> bool:
        """Whether another period has been completed since the last call that said so."""
        periods = self._periods(state)
        if periods == self._passed:
            return False
        self._passed = periods
        return True

    def _periods(self, state: TrainState) -> int:
        return int(self._interval.count(state) / self._interval.amount) if self._interval else 0


def _validate(value: Any) -> Interval:
    try:
        return Interval.parse(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


_to_text: Callable[[Interval], str] = str

IntervalField = Annotated[
    Interval,
    BeforeValidator(_validate),
    PlainSerializer(_to_text, return_type=str),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["500 steps", "15 min"]}),
]
"""The type of a config field that holds an interval: read from text, written as text."""
