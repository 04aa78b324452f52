"""The result of a run: how it ended, and its metrics."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nexus_core.intervals import Interval, TrainState
from nexus_core.views.history import History, Metrics
from nexus_core.views.keyboard import INTERRUPTED
from nexus_core.views.tables import counted, headlines, metric_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Result"]


@dataclass(frozen=True, repr=False)
class Result:
    """How a run ended, the last value of every metric, and their history.

    The status is "finished"; "interrupted" by Ctrl-C or the stop button of a notebook; or "stopped"
    early with a reason. A run whose last evaluation was abandoned is not "finished": resuming it
    repeats the evaluation.
    """

    status: str
    reason: str
    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    history: History = field(default_factory=History, compare=False)
    samples: int = 0

    @classmethod
    def of(
        cls,
        state: TrainState,
        horizon: Interval | None,
        reason: str | None,
        metrics: Metrics,
        owed: bool,
    ) -> Result:
        """The result from a run's counters, horizon, stop reason and metrics.

        Args:
            owed: an evaluation was abandoned.
        """
        done = horizon is not None and horizon.reached(state) and not owed
        early = "interrupted" if reason in INTERRUPTED else "stopped"
        return cls(
            "finished" if done else early,
            reason or "",
            state.step,
            state.tokens,
            state.seconds,
            dict(metrics),
            metrics.history(),
            state.samples,
        )

    def plot(self, *names: str) -> Figure:
        """Draw the history as `History.plot` does: `result.plot("loss", "accuracy")`."""
        return self.history.plot(*names)

    def __repr__(self) -> str:
        return f"<Result {self._how()}: {headlines(self.metrics) or 'no metric'}>"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self._how())}</b></p>{metric_table(self.metrics)}"

    def _how(self) -> str:
        """How the run ended, in words."""
        said = self.reason.startswith(self.status)
        how = self.reason if said else self.status + (f" ({self.reason})" if self.reason else "")
        unit = "sample" if self.tokens == self.samples else "token"
        much = f"{counted(self.tokens, unit)}, {self.seconds:,.1f} s"
        return f"{how} at step {self.step:,}, {much}"
