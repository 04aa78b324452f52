"""The metrics of a run over time, in columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_core.errors import ConfigError
from nexus_core.intervals import TrainState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METRICS", "History", "Metrics"]

METRICS = "metrics.jsonl"
"""The file in a run folder with one line per log and evaluation."""
MOST = 5_000
"""Logs, and evaluations, kept in memory; beyond that they are thinned evenly."""
NAN = math.nan
Row = dict[str, float]


class History(dict[str, list[float]]):
    """The metrics of a run in columns of equal length, one row per step; NaN for missing values.

    The columns are `step`, `tokens` and all training and evaluation metrics. It is a dict of lists:
    pass it to `pandas.DataFrame(history)` or `plt.plot(history["step"], ...)`. `points` drops the
    missing values of a metric.
    """

    @classmethod
    def of(cls, rows: Iterator[Row]) -> History:
        """Turn rows into columns; rows of the same step are merged."""
        steps = dict[float, Row]()
        for row in sorted(rows, key=itemgetter("step")):
            steps.setdefault(row["step"], {}).update(row)
        names = dict.fromkeys(["step", "tokens", *(name for row in steps.values() for name in row)])
        return cls({name: [row.get(name, NAN) for row in steps.values()] for name in names})

    @classmethod
    def read(cls, folder: str | Path) -> History:
        """Read `metrics.jsonl` in a run folder; values that were not finite are NaN.

        Raises:
            ConfigError: there is no such file.
        """
        file = Path(folder) / METRICS
        if not file.is_file():
            raise ConfigError(
                f"'{folder}' has no {METRICS}; pass the folder of a run that wrote one"
            )
        return cls.of(_rows(file))

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps at which a metric has a value, and the values.

        Raises:
            ConfigError: there is no metric of that name.
        """
        if name not in self:
            raise ConfigError(f"there is no metric '{name}'; there are {', '.join(self.names)}")
        pairs = zip(self["step"], self[name], strict=True)
        found = [(step, value) for step, value in pairs if not math.isnan(value)]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def names(self) -> list[str]:
        """The metrics that have a value."""
        return [name for name in self if name not in ("step", "tokens")]

    def plot(self, *names: str) -> Figure:
        """Plot metrics over steps: one panel per metric, training and evaluation together.

        Args:
            names: metrics to plot, such as "loss", or "val/loss" for one split; by default up to
                six, losses first.

        Returns:
            The figure, which a notebook displays; `figure.savefig("run.png")` saves it.

        Raises:
            ConfigError: matplotlib is not installed, or a metric does not exist.
        """
        from nexus_core.views.picture import draw

        return draw(self, names)

    def __repr__(self) -> str:
        steps = self.get("step") or [0]
        return (
            f"<History of {len(steps):,} rows, steps {steps[0]:,} to {steps[-1]:,}: "
            f"{', '.join(self.names) or 'no metric yet'}>"
        )


class Metrics(dict[str, float]):
    """The last value of every metric, and the rows of their history.

    Args:
        state: the counters of the run.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self._state = state
        self._logs, self._evaluations = _Spread(), _Spread()

    def keep(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the current step."""
        self.update(metrics)
        self._add({"step": self._state.step, "tokens": self._state.tokens, **metrics})

    def recall(self, folder: Path | None) -> None:
        """Read the rows up to the current step from the run folder, if none are in memory."""
        file = folder / METRICS if folder is not None else None
        if file is not None and file.is_file() and not (self._logs or self._evaluations):
            for row in _rows(file):
                if row["step"] <= self._state.step:
                    self._add(row)

    def history(self) -> History:
        """The rows up to the current step, as columns."""
        rows = [*self._logs.rows(), *self._evaluations.rows()]
        return History.of(row for row in rows if row["step"] <= self._state.step)

    def _add(self, row: Row) -> None:
        (self._evaluations if _is_evaluation(row) else self._logs).add(row)


class _Spread:
    """Rows in order: all of them, or every second, fourth, ... and the latest."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, Row]] = []  # each with its number
        self._every = 1

    def add(self, row: Row) -> None:
        """Add a row; rows of later steps, from before going back to a snapshot, are dropped."""
        rows, number = self._rows, len(self._rows) and self._rows[-1][0] + 1
        while rows and rows[-1][1]["step"] > row["step"]:
            number = rows.pop()[0]
        if rows and rows[-1][0] % self._every:
            rows.pop()
        rows.append((number, row))
        if len(rows) > MOST:
            self._every *= 2
            rows[:] = [each for each in rows if each[0] % self._every == 0 or each is rows[-1]]

    def rows(self) -> list[Row]:
        return [row for _, row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)


def _is_evaluation(row: Row) -> bool:
    return any(name.endswith("/total_loss") and name != "train/total_loss" for name in row)


def _rows(file: Path) -> Iterator[Row]:
    """The metric lines of the file; torn lines and notes are skipped."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and _is_number(record.get("step")) and "note" not in record:
                record.pop("time", None)
                yield {name: v if _is_number(v) else NAN for name, v in record.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
