"""How far a run is, and lengths of training: "500 steps", "2 epochs", "10M tokens", "15 min"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from nexus_core.errors import ConfigError

__all__ = ["Every", "Interval", "IntervalField", "Result", "TrainState"]

_EXAMPLES = '"500 steps", "2 epochs", "10M tokens", "15 min"'
_AMOUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([kKMB]?)\s*([a-z]*)")
_FACTORS = {"": 1, "k": 1_000, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
_SECONDS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
_WHOLE = ("steps", "samples", "tokens")


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
    def epochs(self) -> float:
        """Epochs done, the present one as a fraction where its length is known, to 9 digits."""
        return round(self.epoch + (self.batch / self.epoch_length if self.epoch_length else 0), 9)

    def counted(self, unit: str) -> float:
        """The amount done of a unit: steps, epochs, samples, tokens or seconds."""
        return self.step if unit == "steps" else float(getattr(self, unit))


@dataclass(frozen=True)
class Result:
    """How a run ended: "finished", or "stopped" early for a reason; the last of every metric."""

    status: str
    reason: str
    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Interval:
    """A length of training: a positive amount of steps, epochs, samples, tokens or seconds."""

    amount: float
    unit: str

    def __post_init__(self) -> None:
        known = self.unit in (*_WHOLE, "epochs", "seconds")
        whole = self.unit not in _WHOLE or self.amount == self.amount // 1
        if not (known and whole and 0 < self.amount < float("inf")):
            raise ConfigError(f"no interval: {self.amount:g} {self.unit}; expected {_EXAMPLES}")

    @classmethod
    def parse(cls, value: Interval | str | int) -> Interval:
        """Read "500 steps", "1.5 epochs", "10M tokens", "8 h"; a bare whole number is steps.

        Raises:
            ConfigError: it is not an amount and a unit.
        """
        if isinstance(value, Interval):
            return value
        match = _AMOUNT.fullmatch(str(value).strip())
        if match is None:
            raise ConfigError(f"cannot read the interval {value!r}; expected {_EXAMPLES}")
        number, factor, name = match.groups()
        amount = Decimal(number.replace("_", "")) * _FACTORS[factor]
        seconds = _SECONDS.get(name) or _SECONDS.get(name.removesuffix("s"))
        if seconds:
            return cls(float(amount * seconds), "seconds")
        return cls(float(amount), f"{name.removesuffix('s')}s" if name else "steps")

    def progress(self, state: TrainState) -> float:
        """The share of this interval that is done, from 0 to 1."""
        return min(1.0, state.counted(self.unit) / self.amount)

    def reached(self, state: TrainState) -> bool:
        """Whether the run has done at least this much."""
        return state.counted(self.unit) >= self.amount

    def __str__(self) -> str:
        minutes = self.unit == "seconds" and self.amount % 60 == 0
        amount, unit = (self.amount / 60, "min") if minutes else (self.amount, self.unit)
        return f"{Decimal(repr(amount)).normalize():f} {unit}"


class Every:
    """Tells once per period that it has passed since the counters were `state`; None: never."""

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
    WithJsonSchema({"type": ["string", "integer"], "examples": ["500 steps", "15 min"]}),
]
"""The type of a config field that holds an interval: read from text, written as text."""
