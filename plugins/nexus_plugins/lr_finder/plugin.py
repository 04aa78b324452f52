"""The learning rate range test."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nexus_core import ConfigError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.cli.chart import save_picture, text_chart
from nexus_core.errors import hint_set
from nexus_plugins.lr_finder.sweep import FEWEST, Sweep, length_until_divergence

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["LrFinderConfig", "LrFinderPlugin"]

READ_EVERY = 8  # steps, on devices where reading the loss syncs


class LrFinderConfig(PluginConfig):
    """Settings of the range test."""

    start: float = Field(
        default=1e-6,
        gt=0,
        description="learning rate of the first step, for the first parameter group; the others "
        "keep their ratio to it",
    )
    end: float = Field(default=1.0, gt=0, description="learning rate of the last step, likewise")
    steps: int = Field(default=100, ge=FEWEST, description="number of steps, unless it stops early")
    smoothing: float = Field(
        default=0.8, ge=0, lt=1, description="decay of the loss's running mean per step"
    )
    diverged: float = Field(
        default=4.0, gt=1, description="stop when the running mean is this many times its minimum"
    )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"end must be above start, {self.start:g}")
        return self


class LrFinderPlugin(Plugin[LrFinderConfig]):
    """Raises the learning rate geometrically, stops when the loss diverges, and suggests one.

    It replaces a schedule. Weights and optimizer are saved at the start and restored
    at the end; `sweep()` has the curve, and the run folder gets `lr_finder.csv` and a plot.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3;
    the stop at a multiple of the lowest loss and the tenth of the minimum are from fastai.
    """

    config_class = LrFinderConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "lr"

    def __post_init__(self) -> None:
        self._begin: int | None = None
        self._losses: list[float] = []
        self._pending: list[Tensor] = []
        self._put_by: StateDict = {}

    def sweep(self) -> Sweep:
        """The curve so far."""
        rates = [self._rate(step) for step in range(len(self._losses))]
        return Sweep.of(rates, self._losses, self.config.smoothing)

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Save weights and optimizer.

        Raises:
            ConfigError: the run ends before the test does, or has no base learning rate.
        """
        if self._begin is None:
            self._begin, self._losses = engine.state.step, []
            model = dict(engine.model.state_dict())
            self._put_by = copy.deepcopy(
                {"model": cast(StateDict, model), "optimizer": engine.optimizer.state_dict()}
            )
        last = self._begin + self.config.steps
        if engine.horizon and engine.horizon.unit == "steps" and engine.horizon.amount < last:
            fewer = max(FEWEST, int(engine.horizon.amount) - self._begin)
            raise ConfigError(
                f"lr_finder.steps is {self.config.steps}, but the run ends after "
                f"{engine.horizon}; train longer with ",
                hint_set("until", f"{last} steps"),
                ", or test in fewer steps with ",
                hint_set("lr_finder.steps", fewer),
            )
        if not _base(engine):
            raise ConfigError("lr_finder: the optimizer's learning rate is 0; set it above 0")

    @hookimpl
    def lr_scale(self, engine: Engine) -> float:
        """The ratio of this step's rate to the base."""
        return self._rate(engine.state.step - (self._begin or 0)) / _base(engine)

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        """Record the loss; stop after the last step, or when the loss diverges."""
        self._pending.append(engine.ranks.sum(step.total))
        done = len(self._losses) + len(self._pending) >= self.config.steps
        if not (done or engine.device.type == "cpu" or len(self._pending) == READ_EVERY):
            return
        self._read()
        length = length_until_divergence(self._losses, self.config.smoothing, self.config.diverged)
        if length is not None:
            rate = self._rate(length)
            del self._losses[length:]
            engine.stop(f"lr_finder: the loss diverged at a learning rate of {rate:.2e}")
        elif done:
            engine.stop(f"lr_finder: the test is done, up to {self.config.end:.2e}")

    @hookimpl(stage="settle")
    def on_finish(self, engine: Engine) -> None:
        """Restore weights and optimizer, and write the curve to the run folder."""
        self._give_back(engine)
        if engine.out is not None and engine.ranks.is_main and self._losses:
            engine.out.mkdir(parents=True, exist_ok=True)
            self.sweep().write(engine.out / "lr_finder.csv")
            save_picture(self.sweep().chart, engine.out / "lr_finder.png")

    @hookimpl
    def on_error(self, engine: Engine) -> None:
        """Restore weights and optimizer after a failure."""
        self._give_back(engine)

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """The suggestions, the curve, and where it is written."""
        sweep = self.sweep()
        steepest, tenth = sweep.steepest, sweep.tenth_of_minimum
        rows = {"learning rate": "no suggestion: the loss never fell; lower lr_finder.start"}
        if steepest is not None:
            rows = {
                "learning rate": f"{steepest:.1e}, where the loss falls fastest",
                "or": f"{tenth:.1e}, a tenth of the rate with the lowest loss",
            }
        if self._losses:
            rows["curve"] = text_chart(sweep.chart)
        if engine.out is not None:
            written = [n for n in ("lr_finder.csv", "lr_finder.png") if (engine.out / n).exists()]
            rows["written"] = ", ".join(str(engine.out / name) for name in written)
        return rows

    def state_dict(self) -> StateDict:
        """The losses so far, and the saved weights and optimizer."""
        if self._begin is None:
            return {}
        self._read()
        return {"begin": self._begin, "losses": list(self._losses), "put_by": self._put_by}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the state of the test."""
        self._begin = cast(int, state["begin"])
        self._losses = list(cast(list[float], state["losses"]))
        self._put_by = copy.deepcopy(cast(StateDict, state["put_by"]))

    def _rate(self, step: int) -> float:
        config = self.config
        share = min(step, config.steps - 1) / (config.steps - 1)
        rate: float = config.start * (config.end / config.start) ** share
        return rate

    def _read(self) -> None:
        if self._pending:
            self._losses += torch.stack(self._pending).tolist()
            self._pending = []

    def _give_back(self, engine: Engine) -> None:
        if self._put_by:
            engine.model.load_state_dict(cast(dict[str, Tensor], self._put_by["model"]))
            engine.optimizer.load_state_dict(cast(dict[str, Any], self._put_by["optimizer"]))
            self._begin, self._put_by = None, {}


def _base(engine: Engine) -> float:
    return float(engine.optimizer.param_groups[0]["initial_lr"])
