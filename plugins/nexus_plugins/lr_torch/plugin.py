"""Learning rates from any scheduler with PyTorch's interface: an object, a function, or a name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from pydantic import ConfigDict, Field
from torch.optim import SGD

from nexus_core import ConfigError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.optimizers import members
from nexus_core.places import PlaceField
from nexus_plugins.lr_torch.turning import Every, Turning, find, is_scheduler, make

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["LrTorchConfig", "LrTorchPlugin"]

Setting = bool | int | float | str | list[float] | list[int] | None
METRIC = "val/loss"
"""The default metric for a scheduler that needs one."""


class LrTorchConfig(PluginConfig):
    """Settings of a scheduler."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"scheduler": "StepLR", "settings": {"step_size": 100}}]}
    )
    scheduler: PlaceField = Field(
        description="class in torch.optim.lr_scheduler, such as OneCycleLR, or a path to a "
        "function that builds a scheduler from an optimizer, such as "
        "transformers.get_scheduler or ./net.py:schedule; in Python also the "
        "scheduler or function itself"
    )
    settings: dict[str, Setting] = Field(
        default={}, description="arguments for building the scheduler, besides the optimizer"
    )
    every: Every = Field(
        default="step", description="when to step it; a timm scheduler counts both itself"
    )
    metric: str | None = Field(
        default=None,
        description="evaluation metric (val/accuracy) or training metric (train/loss) for a "
        "scheduler that needs one; null: val/loss",
    )


class LrTorchPlugin(Plugin[LrTorchConfig]):
    """Sets the learning rate with a scheduler from PyTorch, transformers or timm.

    A scheduler passed in Python, or made by a function passed in Python, drives the run's optimizer
    itself, with all groups and momentum, as in a hand-written loop. A scheduler named in settings
    drives a separate optimizer with the run's base learning rate; all groups of the run follow the
    ratio of its rate to the base, and momentum is not changed. It is stepped when a step is
    complete: a step of several micro-batches counts once, and so does a skipped step.

    Args:
        scheduler: a config; or a scheduler over the run's optimizer, a function or class that makes
            one from it, or a list of these for several optimizers.
    """

    config_class = LrTorchConfig
    slot: ClassVar[str | None] = "lr"
    state_version: ClassVar[int] = 2

    if TYPE_CHECKING:

        def __new__(cls, scheduler: Any = None, /, **settings: Any) -> Self:
            """Takes the arguments of `__init__`: more than settings."""

    def __init__(self, scheduler: Any = None, /, **settings: object) -> None:
        config = scheduler if isinstance(scheduler, LrTorchConfig) else None
        several = isinstance(scheduler, Sequence) and not isinstance(scheduler, str)
        self._given: Sequence[Any] = ()
        if isinstance(scheduler, str):
            settings["scheduler"] = scheduler
        elif scheduler is not None and config is None:
            self._given = scheduler if several else [scheduler]
            settings["scheduler"] = ", ".join(map(_name, self._given))
        super().__init__(config, **settings)
        self._turning: list[Turning] = []
        self._shadow: SGD | None = None
        self._base: float | None = None
        self._saved: StateDict = {}
        self._was_measured = False

    @hookimpl
    def on_build(self, engine: Engine) -> None:
        """Create the schedulers that drive the run's own optimizer.

        Raises:
            ConfigError: it is not a scheduler, or drives another optimizer.
        """
        known = [engine.optimizer, *members(engine.optimizer).values()]
        for given in self._given:
            if is_scheduler(given):
                if not any(getattr(given, "optimizer", one) is one for one in known):
                    raise ConfigError(
                        f"lr_torch: {_name(given)} drives another optimizer than the run's; make "
                        "it for the one passed to the Engine, or pass a function that creates it"
                    )
                self._turn(given)
            elif callable(given):
                self._turn(make(given, engine.optimizer, self.config.settings, _name(given)))
            else:
                raise ConfigError(
                    f"LrTorchPlugin takes a scheduler, a function that makes it from an optimizer, "
                    f"or a list of them; got {given!r:.200}"
                )

    @hookimpl(stage="clock")
    def on_start(self, engine: Engine) -> None:
        """Create the scheduler named in settings, and advance it to the run's position.

        Raises:
            ConfigError: there is no such scheduler, it rejects the settings, or another plugin sets
                the same rates.
        """
        if self._given and engine.hook.lr_scale(engine=engine):
            raise ConfigError(
                "lr_torch sets the optimizer's learning rates, but another plugin sets "
                "them too (a schedule rule for optimizer.lr?); remove one of them, or give "
                "lr_torch its scheduler by name in settings"
            )
        if not self._given and not self._turning:
            self._build(float(engine.optimizer.param_groups[0]["initial_lr"]))
        self._follow(engine)

    @hookimpl
    def lr_scale(self, engine: Engine) -> float | None:
        """The ratio of the scheduler's rate to the base; None if it drives the run's optimizer."""
        if self._shadow is None or self._base is None:
            return None
        self._follow(engine)
        return float(self._shadow.param_groups[0]["lr"]) / self._base

    @hookimpl
    def on_log(self, metrics: dict[str, float]) -> None:
        """Step by a training metric."""
        self._measure(metrics)

    @hookimpl(stage="decide")
    def on_eval(self, metrics: dict[str, float]) -> None:
        """Step by a metric of the evaluation.

        Raises:
            ConfigError: this set's evaluation does not report the metric.
        """
        split = self._metric.partition("/")[0]
        if self._metric not in metrics and any(name.startswith(f"{split}/") for name in metrics):
            raise ConfigError(
                f"{self.name}.metric is '{self._metric}', which this evaluation does not have; it "
                f"has {', '.join(sorted(metrics))}"
            )
        self._measure(metrics)

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        """Step the schedulers."""
        self._follow(engine)

    @hookimpl
    def on_finish(self) -> None:
        """Warn if a scheduler's metric was never measured."""
        if not self._was_measured and any(turning.measures for turning in self._turning):
            warnings.warn(
                f"{self.config.scheduler} needs '{self._metric}', which was never measured, so "
                "the learning rate has not moved; pass eval_data and eval_every, or set "
                f"{self.name}.metric",
                RuntimeWarning,
                stacklevel=2,
            )

    def state_dict(self) -> StateDict:
        """The scheduler's state, and that of its separate optimizer if it has one."""
        if not self._turning:
            return self._saved
        state: StateDict = {"schedulers": [turning.state() for turning in self._turning]}
        if self._shadow is not None:
            group = self._shadow.param_groups[0]
            own = {key: value for key, value in group.items() if key != "params"}
            state |= {"base": self._base, "group": own}
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what `state_dict` returned, or keep it until the scheduler is built."""
        self._saved = state
        if "base" in state:
            self._base = cast(float, state["base"])
        if self._turning and "schedulers" in state:
            states = cast(list[StateDict], state["schedulers"])
            for turning, own in zip(self._turning, states, strict=True):
                turning.load(own)
            if self._shadow is not None:
                self._shadow.param_groups[0].update(cast(Mapping[str, Any], state["group"]))

    def migrate(self, state: StateDict, from_version: int) -> StateDict:
        """Version 1 only saved the base rate; the steps are repeated from there."""
        return state

    @property
    def _metric(self) -> str:
        return self.config.metric or METRIC

    def _build(self, base: float) -> None:
        if self._base is None:
            self._base = base
        self._shadow = SGD([torch.zeros(1, requires_grad=True)], lr=self._base)
        name = self.config.scheduler
        self._turn(make(find(name), self._shadow, self.config.settings, name))
        self._shadow.step()  # or a scheduler would warn that it precedes the first step
        self.load_state_dict(self._saved)

    def _turn(self, scheduler: Any) -> None:
        turning = Turning(scheduler, self.config.every)
        if self.config.metric and not (turning.measures or turning.is_told):
            raise ConfigError(
                f"{self.name}.metric is '{self.config.metric}', but {_name(scheduler)} uses "
                "no metric; remove it, or use ReduceLROnPlateau"
            )
        self._turning.append(turning)

    def _measure(self, metrics: Mapping[str, float]) -> None:
        if self._metric in metrics:
            self._was_measured = True
            for turning in self._turning:
                if turning.measures:
                    turning.measured(float(metrics[self._metric]))

    def _follow(self, engine: Engine) -> None:
        at, metric = engine.state, engine.metrics.get(self._metric)
        for turning in self._turning:
            turning.follow(at.step, at.epoch, metric)


def _name(given: Any) -> str:
    """The name of a scheduler or function."""
    named: Callable[..., Any] = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}.{named.__qualname__}"
