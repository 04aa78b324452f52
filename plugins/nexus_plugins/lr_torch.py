"""Any learning-rate scheduler of PyTorch, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import ConfigDict, Field
from torch.optim import SGD, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from nexus_core import ConfigError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.errors import suggestion

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["LrTorchConfig", "LrTorchPlugin"]

Setting = bool | int | float | str | list[float] | list[int] | None
Make = Callable[..., LRScheduler]


class LrTorchConfig(PluginConfig):
    """Settings of a scheduler of `torch.optim.lr_scheduler`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"scheduler": "StepLR", "settings": {"step_size": 100}}]}
    )
    scheduler: str = Field(description="class in torch.optim.lr_scheduler, such as OneCycleLR")
    settings: dict[str, Setting] = Field({}, description="its arguments; steps are the run's steps")


class LrTorchPlugin(Plugin[LrTorchConfig]):
    """Sets the learning rate by a scheduler of PyTorch, one turn a step.

    The scheduler drives an optimizer of its own with one parameter and the run's base learning
    rate; the ratio to the base is what the groups of the run follow. Momentum is not touched.
    On resuming, its turns are made again (a few microseconds each), so the base alone is saved.
    """

    slot: ClassVar[str | None] = "lr"
    _base: float | None = None
    _shadow: SGD
    _scheduler: LRScheduler
    _turns: int

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Build the scheduler and bring it to where the run is.

        Raises:
            ConfigError: there is no such scheduler, or it does not take the settings.
        """
        if self._base is None:
            self._base = float(engine.optimizer.param_groups[0]["initial_lr"])
        self._shadow = SGD([torch.zeros(1, requires_grad=True)], lr=self._base)
        name, settings = self.config.scheduler, self.config.settings
        make = _scheduler_class(name)
        try:
            self._scheduler = make(self._shadow, **settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"lr_torch: {name} does not take the settings {settings}: {error}; "
                f"it takes {', '.join(list(inspect.signature(make).parameters)[1:])}"
            ) from error
        self._shadow.step()  # a scheduler warns where it turns before the first step
        self._turns = 0
        self._follow(engine)

    @hookimpl
    def lr_scale(self, engine: Engine) -> float:
        """The ratio of the scheduler's learning rate to the base."""
        self._follow(engine)
        return float(self._shadow.param_groups[0]["lr"]) / cast(float, self._base)

    def state_dict(self) -> StateDict:
        """The base: a rule of `schedule` may have moved the run's own by the time it resumes."""
        return {} if self._base is None else {"base": self._base}

    def load_state_dict(self, state: StateDict) -> None:
        """Take back what `state_dict` gave."""
        self._base = cast(float, state["base"])

    def _follow(self, engine: Engine) -> None:
        while self._turns < engine.state.step:
            self._scheduler.step()
            self._turns += 1


def _scheduler_class(name: str) -> Make:
    known: dict[str, Make] = {
        key: value
        for key, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, LRScheduler) and "LRScheduler" not in key
    }
    known.pop(ReduceLROnPlateau.__name__, None)
    if name not in known:
        raise ConfigError(
            f"lr_torch.scheduler is '{name}', which is no schedule over steps of "
            f"torch.optim.lr_scheduler.{suggestion(name, known)} Known: {', '.join(sorted(known))}"
        )
    return known[name]
