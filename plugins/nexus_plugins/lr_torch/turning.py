"""Schedulers of any library: how to create and step them, and their state as plain values."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from nexus_core import ConfigError, StateDict, places
from nexus_core.errors import suggestion

__all__ = ["Every", "Turning", "find", "is_scheduler", "make"]

Every = Literal["step", "epoch"]


class Turning:
    """A scheduler, and how far it has been stepped.

    There are three kinds: those with `step_update` (timm's) are given the run's position in steps
    and epochs; those whose `step` requires a value (`ReduceLROnPlateau`) are stepped when a metric
    is measured; all others are stepped at each step or epoch.

    Args:
        scheduler: a scheduler from PyTorch, transformers or timm, or a similar object.
        every: when to step one of the last kind.
    """

    def __init__(self, scheduler: Any, every: Every) -> None:
        self.scheduler, self._every = scheduler, every
        self._step, self._epoch = 0, 0
        self.is_told = callable(getattr(scheduler, "step_update", None))
        self.measures = not self.is_told and _demands(scheduler.step)

    def follow(self, step: int, epoch: int, metric: float | None) -> None:
        """Advance it to the run's position, if it is not there already."""
        if self.is_told:
            if step > self._step:
                self.scheduler.step_update(step)
            if epoch > self._epoch:
                self.scheduler.step(epoch, metric)
        elif not self.measures:
            done, due = (self._step, step) if self._every == "step" else (self._epoch, epoch)
            for _ in range(due - done):
                self.scheduler.step()
        self._step, self._epoch = step, epoch

    def measured(self, value: float) -> None:
        """Step by a metric."""
        self.scheduler.step(value)

    def state(self) -> StateDict:
        """The scheduler's state as plain values, and its position."""
        found = {
            "step": self._step,
            "epoch": self._epoch,
            "own": _plain(self.scheduler.state_dict()),
        }
        inner = getattr(self.scheduler, "lr_scheduler", None)
        if self.is_told and inner is not None:  # timm's plateau saves only part of its state
            found["inner"] = _plain(inner.state_dict())
        return cast(StateDict, found)

    def load(self, state: StateDict) -> None:
        """Restore what `state` returned."""
        self._step, self._epoch = cast(int, state["step"]), cast(int, state["epoch"])
        own = self.scheduler.state_dict()
        self.scheduler.load_state_dict(_as_before(own, state["own"]))
        if "inner" in state:
            self.scheduler.lr_scheduler.load_state_dict(state["inner"])


def is_scheduler(found: object) -> bool:
    """Whether it is a scheduler, not a function or class that makes one."""
    return not isinstance(found, type) and callable(getattr(found, "step", None))


def find(name: str) -> Callable[..., Any]:
    """A scheduler class or function, by its name in `torch.optim.lr_scheduler` or import path.

    Raises:
        ConfigError: it does not exist.
    """
    known: dict[str, Callable[..., Any]] = {
        key: value
        for key, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, LRScheduler) and "LRScheduler" not in key
    }
    if name in known:
        return known[name]
    if not {".", ":"}.intersection(name):
        raise ConfigError(
            f"lr_torch.scheduler is '{name}', which is not in torch.optim.lr_scheduler."
            f"{suggestion(name, known)} Known: {', '.join(sorted(known))}; or the import path of "
            "one from elsewhere, such as transformers.get_scheduler or ./net.py:schedule"
        )
    try:
        found = places.load(name)
    except ConfigError as error:
        raise ConfigError(f"lr_torch.scheduler: {error}") from error
    if not callable(found):
        raise ConfigError(
            f"lr_torch.scheduler is '{places.shown(name)}', which is not a function or class"
        )
    return cast(Callable[..., Any], found)


def make(
    factory: Callable[..., Any], optimizer: Optimizer, settings: Mapping[str, Any], name: str
) -> Any:
    """Create a scheduler for an optimizer with a class or function.

    Raises:
        ConfigError: it rejects the settings, or returns something else.
    """
    parameters, name = inspect.signature(factory).parameters, places.shown(name)
    try:
        if "optimizer" in parameters:
            made = factory(optimizer=optimizer, **settings)
        else:
            made = factory(optimizer, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        takes = ", ".join(key for key in parameters if key != "optimizer")
        raise ConfigError(
            f"lr_torch: {name} does not take the settings {dict(settings)}: {error}; it takes "
            f"{takes}"
        ) from error
    if not is_scheduler(made):
        raise ConfigError(f"lr_torch: {name} returned {made!r:.200}; expected a scheduler")
    return made


def _demands(step: Callable[..., Any]) -> bool:
    """Whether `step` requires a value."""
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
               for p in inspect.signature(step).parameters.values())  # fmt: skip


def _plain(value: Any) -> Any:
    """The value as dicts, lists and Python numbers, as a checkpoint stores it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if scalar else value


def _as_before(own: Any, saved: Any) -> Any:
    """A saved state, with Counters where the current state has them."""
    if isinstance(own, Counter):
        return Counter(saved)
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        return {key: _as_before(own.get(key), item) for key, item in saved.items()}
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [_as_before(*pair) for pair in zip(own, saved, strict=True)]
    return saved
