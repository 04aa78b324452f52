"""The observing plugins of a probe: before all others, after them, and per operation."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core import Plugin, PluginConfig, hookimpl
from nexus_plugins.tape.probe import Probe

if TYPE_CHECKING:
    from nexus_core import Step
    from nexus_core.engine import Engine

__all__ = ["LookingProbe", "ProbeFirstPlugin", "ProbeLastPlugin"]


class LookingProbe(Probe):
    """A probe with the plugins that it needs."""

    def plugins(self) -> tuple[list[Plugin[Any]], list[Plugin[Any]]]:
        """One plugin that runs before all others, and one that runs after them."""
        return [ProbeFirstPlugin(self)], [ProbeLastPlugin(self)]


class ProbeFirstPlugin(Plugin[PluginConfig]):
    """Records the inputs of a step, before any other plugin changes them."""

    only_watches: ClassVar[bool] = True

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self._probe = probe

    @hookimpl
    def on_build(self, engine: Engine) -> None:
        self._probe.built(engine)

    @hookimpl
    def on_batch(self, batch: Any) -> None:
        self._probe.batch("from the data", batch)

    @hookimpl(stage="context", wrapper=True)
    def forward(self) -> Generator[None, Any, Any]:
        return (yield from _observed(self._probe))

    @hookimpl(stage="context", wrapper=True)
    def loss_terms(self) -> Generator[None, Any, Any]:
        return (yield from _observed(self._probe))

    @hookimpl(wrapper=True)
    def backward(self) -> Generator[None, Any, Any]:
        return (yield from _observed(self._probe))

    @hookimpl(stage="reduce")
    def after_backward(self, engine: Engine, step: Step) -> None:
        self._probe.losses(step)
        self._probe.gradient(engine, "backward", "")

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool, bool]:
        self._probe.settings(engine)
        answer: bool = yield
        self._probe.updated(engine, "update")
        return answer


class ProbeLastPlugin(Plugin[PluginConfig]):
    """Records the result of the other plugins."""

    only_watches: ClassVar[bool] = True

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self._probe = probe

    @hookimpl(stage="inspect", trylast=True)
    def on_batch(self, batch: Any) -> None:
        self._probe.batch("as trained on", batch)
        self._probe.generators()

    @hookimpl(stage="measure", trylast=True)
    def after_backward(self, engine: Engine) -> None:
        self._probe.gradient(engine, "gradient", ", as applied")

    @hookimpl(stage="restore", trylast=True)
    def on_step(self, engine: Engine) -> None:
        self._probe.updated(engine, "end")


def _observed(probe: Probe) -> Generator[None, Any, Any]:
    if not probe.notes_operations:
        return (yield)
    with _Operations(probe):
        return (yield)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each tensor operation that computes something."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._probe = probe

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and record its result."""
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:  # nothing was computed
            with torch._C._DisableTorchDispatch():
                self._probe.operation(func.__name__.partition(".")[0], output)
        return output
