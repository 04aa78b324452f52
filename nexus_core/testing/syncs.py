"""Detect where a plugin synchronizes with the device, and count its operations."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core.engine import Engine
from nexus_core.plugin import Plugin

__all__ = ["Operations", "OwnWait", "WaitWatch"]

_FIRING = ("nexus_core.step", "nexus_core.engine", "nexus_core.relay", "pluggy.")
_FLAT = ("", "nexus_plugins", "nexus_plugins_contrib")  # one module, one plugin


@dataclass(frozen=True)
class OwnWait:
    """A line of a plugin that makes the host wait for the device."""

    what: str
    where: str


class WaitWatch:
    """Records every wait for the accelerator caused by one plugin.

    A wait belongs to the plugin if one of its methods, or a function of its module or package, is
    on the stack below the engine, and no method of another plugin is.

    Args:
        engine: engine of the run.
        name: name of the plugin.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.waits: list[OwnWait] = []
        self._plugin = engine.plugins[name]
        self._others = [id(p) for p in engine.plugins.values() if p is not self._plugin]
        self._modules = _home(self._plugin)

    def __call__(self, what: str, frame: FrameType) -> None:
        """Record a wait if it belongs to the plugin."""
        frames = list(_below_the_engine(frame))
        own = [f for f in frames if self._owns(f)]
        foreign = any(id(f.f_locals.get("self")) in self._others for f in frames)
        if own and not foreign:
            self.waits.append(OwnWait(what, _place(own[0])))

    def _owns(self, frame: FrameType) -> bool:
        module = str(frame.f_globals.get("__name__"))
        return frame.f_locals.get("self") is self._plugin or module.startswith(self._modules)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor operations by name while active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count an operation, and run it."""
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def _home(plugin: Plugin[Any]) -> tuple[str, ...]:
    """The plugin's module, and the modules in it if it is a package."""
    module = type(plugin).__module__
    package = sys.modules[module].__package__ or ""
    return (module,) if package in _FLAT else (module, f"{package}.")


def _below_the_engine(frame: FrameType) -> Iterator[FrameType]:
    """The frames up to the one where the engine called a plugin."""
    here: FrameType | None = frame
    while here is not None and not str(here.f_globals.get("__name__")).startswith(_FIRING):
        yield here
        here = here.f_back


def _place(frame: FrameType) -> str:
    """File, line number and text of a frame's current line."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, line).strip()
    return f"{Path(file).name}:{line} in {frame.f_code.co_name}: {text}"
