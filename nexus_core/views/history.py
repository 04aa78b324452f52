"""What was measured in the course of a run, in columns."""

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
"""The file of a run's folder that holds a line for each log and each evaluation."""
MOST = 5_000
"""Logs, and evaluations, that are held in memory; of more, an even spread and the newest."""
NAN = math.nan
Row = dict[str, float]


class History(dict[str, list[float]]):
    """The metrics of a run in columns of equal length, one row a step; NaN where there is no value.

    The columns are `step`, `tokens` and the metrics, of training and of evaluations, by name. It is
    a dict of lists: `pandas.DataFrame(history)` and `plt.plot(history["step"], ...)` take it as it
    is. Of a metric that is measured now and then, `points` leaves out the gaps.
    """

    @classmethod
    def of(cls, rows: Iterator[Row]) -> History:
        """Rows as columns; those of one step are one."""
        steps = dict[float, Row]()
        for row in sorted(rows, key=itemgetter("step")):
            steps.setdefault(row["step"], {}).update(row)
        names = dict.fromkeys(["step", "tokens", *(name for row in steps.values() for name in row)])
        return cls({name: [row.get(name, NAN) for row in steps.values()] for name in names})

    @classmethod
    def read(cls, folder: str | Path) -> History:
        """All that `metrics.jsonl` in a run's folder holds; a value that was not finite is NaN.

        Raises:
            ConfigError: there is no such file.
        """
        file = Path(folder) / METRICS
        if not file.is_file():
            raise ConfigError(
                f"'{folder}' holds no {METRICS}; give the folder of a run that wrote it"
            )
        return cls.of(_rows(file))

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """The steps at which a metric has a value, and the values.

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
        """Draw metrics over the steps: a panel each, training and evaluations together.

        Args:
            names: of metrics, `val/loss`, or without the split, `loss`; none: losses first, and no
                more than six panels.

        Returns:
            The figure, which a notebook shows; `figure.savefig("run.png")` writes it.

        Raises:
            ConfigError: matplotlib is not installed, or a metric is not there.
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
    """The last value of every metric, and the rows that a history is made of.

    Args:
        state: the counters of the run.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self._state = state
        self._logs, self._evaluations = _Spread(), _Spread()

    def keep(self, metrics: Mapping[str, float]) -> None:
        """Take what was measured at the present step."""
        self.update(metrics)
        self._add({"step": self._state.step, "tokens": self._state.tokens, **metrics})

    def recall(self, folder: Path | None) -> None:
        """Take what the run's folder holds of the steps before, where there is nothing else."""
        file = folder / METRICS if folder is not None else None
        if file is not None and file.is_file() and not (self._logs or self._evaluations):
            for row in _rows(file):
                if row["step"] <= self._state.step:
                    self._add(row)

    def history(self) -> History:
        """The rows up to the present step, as columns."""
        rows = [*self._logs.rows(), *self._evaluations.rows()]
        return History.of(row for row in rows if row["step"] <= self._state.step)

    def _add(self, row: Row) -> None:
        (self._evaluations if _is_evaluation(row) else self._logs).add(row)


class _Spread:
    """Rows in their order: all of them, or every second, fourth, ... and the newest."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, Row]] = []  # each with its number
        self._every = 1

    def add(self, row: Row) -> None:
        """Take a row; those of later steps are of a past that has been left."""
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
    """The lines of numbers in a metrics file; a torn one is passed over, and so are notes."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record and "note" not in record:
                record.pop("time", None)
                yield {name: NAN if value is None else value for name, value in record.items()}
