"""Seeing where a plugin waits for the device, on a machine that may have none."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core.engine import Engine
from nexus_core.plugin import Plugin

__all__ = ["Operations", "Read", "ReadWatch"]

READS = frozenset(
    {
        *("item", "tolist", "numpy", "cpu", "__array__"),
        *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"),
        *("__repr__", "__format__", "equal", "allclose", "is_nonzero"),
        *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"),
    }
)
"""Functions that give a number to the host, or whose result's shape depends on the numbers."""

_FIRING = ("nexus_core.step", "nexus_core.engine", "nexus_core.relay", "pluggy.")
_FLAT = ("", "nexus_plugins", "nexus_plugins_contrib")  # one module, one plugin
_IS_CPU: Any = Tensor.is_cpu


@dataclass(frozen=True)
class Read:
    """A place where the host reads what is on the device, and so waits for it."""

    what: str
    function: str
    where: str


class ReadWatch(TorchFunctionMode):
    """While it is active, notes every read of a tensor that the code of one plugin makes.

    A read counts when a frame of the plugin is on the stack below the engine that called it:
    a method of its, or a function of its module or package. Tensors tell the plugin, and what it
    calls, that they are not on the host (`is_cpu` is False), so what it reads on a CPU alone is
    not seen.
    A copy to the host is seen as `.cpu()` and `.to("cpu")`; to a `torch.device` it may be one to
    the run's own device. Other threads are not watched.

    Args:
        engine: of the run.
        name: of the plugin whose reads count.
        allowed: names of its functions that may read.
    """

    def __init__(self, engine: Engine, name: str, allowed: Iterable[str] = ()) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self._plugin = engine.plugins[name]
        self._others = [id(p) for p in engine.plugins.values() if p is not self._plugin]
        self._allowed = frozenset(allowed)
        self._modules = _home(self._plugin)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note the call where it is a read, and make it."""
        keywords = kwargs or {}
        if func == _IS_CPU.__get__ and any(map(self._owns, _below_the_engine(sys._getframe(1)))):
            return False
        if what := _read(func, args, keywords):
            self._note(what, sys._getframe(1))
        return func(*args, **keywords)

    def _note(self, what: str, frame: FrameType | None) -> None:
        frames = list(_below_the_engine(frame))
        own = [f for f in frames if self._owns(f)]
        foreign = any(id(f.f_locals.get("self")) in self._others for f in frames)
        if own and not foreign and not self._allowed & {f.f_code.co_name for f in own}:
            self.reads.append(Read(what, own[0].f_code.co_name, _place(own[0])))

    def _owns(self, frame: FrameType) -> bool:
        module = str(frame.f_globals.get("__name__"))
        return frame.f_locals.get("self") is self._plugin or module.startswith(self._modules)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, counts the tensor operations that run, by name."""

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
        """Count the operation, and run it."""
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def _home(plugin: Plugin[Any]) -> tuple[str, ...]:
    """The plugin's module, and all within it where it is a package."""
    module = type(plugin).__module__
    package = sys.modules[module].__package__ or ""
    return (module,) if package in _FLAT else (module, f"{package}.")


def _below_the_engine(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from here up to the one in which the engine called a plugin."""
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith(_FIRING):
        yield frame
        frame = frame.f_back


def _read(func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What the call reads, in words; nothing where it does not wait."""
    name = getattr(func, "__name__", "")
    if name in READS:
        return f"Tensor.{name}"
    if name == "to" and "cpu" in [a for a in (*args[1:], *keywords.values()) if type(a) is str]:
        return 'Tensor.to("cpu")'
    if name == "__getitem__" and _has_mask(args[1]):
        return "indexing by a mask"
    if name == "where" and len(args) + len(keywords) == 1:
        return "torch.where(condition)"
    lengths = keywords.get("repeats", args[1] if len(args) > 1 else None)
    if (
        name == "repeat_interleave"
        and isinstance(lengths, Tensor)
        and "output_size" not in keywords
    ):
        return "repeat_interleave without output_size"
    return ""


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8) for p in parts)


def _place(frame: FrameType) -> str:
    """File, line and text of the line that a frame is at."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, line).strip()
    return f"{Path(file).name}:{line} in {frame.f_code.co_name}: {text}"
