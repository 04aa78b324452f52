"""Ends a run that no longer improves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from nexus_core import ConfigError, Plugin, PluginConfig, StateDict, hookimpl

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["EarlyStopConfig", "EarlyStopPlugin"]


class EarlyStopConfig(PluginConfig):
    """Settings of early stopping."""

    metric: str = Field(default="val/loss", description="evaluation metric to watch")
    mode: Literal["min", "max"] = Field(
        default="min", description="whether lower or higher is better"
    )
    patience: int = Field(
        default=5, ge=1, description="consecutive evaluations without improvement before stopping"
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="minimum improvement, in units of the metric"
    )


class EarlyStopPlugin(Plugin[EarlyStopConfig]):
    """Stops training when an evaluation metric has not improved for `patience` evaluations.

    A NaN counts as no improvement. The last step is completed and saved as at the end of any run;
    the best weights are the checkpoint plugin's `best`.

    Source: Prechelt 1998, "Early Stopping - But When?", the third class of criteria (UP), with
    the distance to the best instead of strips.
    """

    config_class = EarlyStopConfig
    api_version: ClassVar[str] = "1.2"
    _best: float | None = None
    _best_step: int = 0
    _waited: int = 0

    @hookimpl(stage="decide")
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Compare the metric with the best so far.

        Raises:
            ConfigError: the evaluation does not report this metric.
        """
        name = self.config.metric
        if name not in metrics:
            raise ConfigError(
                f"{self.name}.metric is '{name}', which this evaluation does not have; "
                f"it has {', '.join(sorted(metrics))}"
            )
        if self._improves(metrics[name]):
            self._best, self._best_step, self._waited = metrics[name], engine.state.step, 0
            return
        self._waited += 1
        if self._waited >= self.config.patience:
            engine.stop(self._reason())

    def state_dict(self) -> StateDict:
        """The best value, its step, and the number of evaluations since."""
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the count."""
        best = cast("float | None", state["best"])
        self._best = None if best is None else float(best)
        self._best_step = cast(int, state["best_step"])
        self._waited = cast(int, state["waited"])

    def _improves(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self._best is None:
            return True
        gain = self._best - value if self.config.mode == "min" else value - self._best
        return gain > self.config.min_delta

    def _reason(self) -> str:
        best = "has not been a number"
        if self._best is not None:
            best = f"has not improved on {self._best:.6g} of step {self._best_step}"
        return f"{self.name}: {self.config.metric} {best} for {self._waited} evaluations"
