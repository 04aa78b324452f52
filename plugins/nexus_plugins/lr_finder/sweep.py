"""The curve of a range test: loss over learning rate, and the suggested rates."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus_core.cli.chart import Chart, Line

__all__ = ["FEWEST", "Sweep", "length_until_divergence", "running_mean"]

FEWEST = 8  # points needed for a suggestion


@dataclass(frozen=True)
class Sweep:
    """The result of a range test.

    Args:
        rates: learning rate of each step, of the first parameter group.
        losses: total loss of each step, before its update.
        smoothed: the losses averaged forwards and backwards, so that nothing is shifted; losses are
            first clamped to the initial ones, so that the divergence does not dominate.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @classmethod
    def of(cls, rates: Sequence[float], losses: Sequence[float], smoothing: float) -> Sweep:
        """Smooth the losses; `smoothing` is the decay of the running mean."""
        ceiling = max(losses[:FEWEST], default=0.0)
        forwards = running_mean([min(loss, ceiling) for loss in losses], smoothing)
        smoothed = running_mean(forwards[::-1], smoothing)[::-1]
        return cls(tuple(rates), tuple(losses), tuple(smoothed))

    @property
    def steepest(self) -> float | None:
        """The rate at which the loss falls fastest over its logarithm, after the first tenth.

        None if there are too few steps, or the loss never falls.
        """
        if len(self.rates) < FEWEST:
            return None
        slope = np.gradient(self.smoothed, np.log(self.rates))
        edge = len(slope) // 10  # near the ends little is averaged, so noise is steep
        place = edge + int(np.argmin(slope[edge : max(self._lowest, edge) + 1]))
        return self.rates[place] if slope[place] < 0 else None

    @property
    def tenth_of_minimum(self) -> float | None:
        """A tenth of the rate with the lowest loss; None if the loss never falls."""
        return None if self.steepest is None else self.rates[self._lowest] / 10

    @property
    def chart(self) -> Chart:
        """Both losses over the rate, with the suggestions marked."""
        low, high = min(self.losses), max(self.smoothed)
        room = 0.2 * (high - low) or 1.0
        marks = {"steepest": self.steepest, "minimum / 10": self.tenth_of_minimum}
        return Chart(
            [Line("loss", self.rates, self.losses), Line("smoothed", self.rates, self.smoothed)],
            "learning rate",
            "loss",
            (low - room, high + room),
            log_x=True,
            marks={name: rate for name, rate in marks.items() if rate is not None},
        )

    def write(self, path: Path) -> None:
        """Write the curve as CSV: step, learning_rate, loss, smoothed_loss."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "learning_rate", "loss", "smoothed_loss"])
            points = zip(self.rates, self.losses, self.smoothed, strict=True)
            writer.writerows((step, *point) for step, point in enumerate(points, start=1))

    @property
    def _lowest(self) -> int:
        return int(np.argmin(self.smoothed))


def running_mean(values: Sequence[float], keep: float) -> list[float]:
    """The exponential running mean, corrected for starting at zero."""
    means: list[float] = []
    total = 0.0
    for count, value in enumerate(values, start=1):
        total = keep * total + (1 - keep) * value
        means.append(total / (1 - keep**count))
    return means


def length_until_divergence(losses: Sequence[float], keep: float, factor: float) -> int | None:
    """How many losses precede the running mean reaching `factor` times its minimum, or NaN.

    None if it does not.
    """
    least = math.inf
    for place, mean in enumerate(running_mean(losses, keep)):
        least = min(least, mean)
        if not math.isfinite(mean) or mean > least + (factor - 1) * abs(least):
            return place
    return None
