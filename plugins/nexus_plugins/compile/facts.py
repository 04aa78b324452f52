"""Host state and host side effects in a step: a graph freezes the former and drops the latter."""

from __future__ import annotations

import dataclasses
import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nexus_core.plugin import Plugin

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["Knowledge", "Owned", "changed", "watching"]

Place: TypeAlias = tuple[object, ...]
Owned: TypeAlias = tuple[Plugin[Any], str]
"""An attribute of a plugin."""

HOOKS = ("forward", "loss_terms", "backward")
"""What the gradient of a step is made of."""
PLAIN = {int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size}
DEEPEST = 4
LONGEST = 64
OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
SMALL = 16
OURS = ("nexus_core.", "nexus_plugins.compile", "torch.")


class Knowledge:
    """The host state that the gradient of a step may depend on, by location.

    It covers the numbers, strings and settings of the participating plugins and the model's
    modules, and the identity of tensors. Tensor contents live on the device and do not count;
    tensors that are plugin attributes may be replaced between steps.

    Args:
        engine: of the run.
        everyone: include the other plugins too, but not the objects they hold, which their own
            threads may be changing.

    Attributes:
        known: the values by location.
        held: the device tensors that are plugin attributes.
        generators: those of the device.
    """

    def __init__(self, engine: Engine, everyone: bool = False) -> None:
        self.known: dict[Place, object] = {}
        self.held: dict[Owned, Tensor] = {}
        self.generators: list[torch.Generator] = []
        self._alive: list[Tensor] = []  # so that no other tensor gets the memory of one seen here
        self._device = engine.device
        self._passed = {id(each) for each in (engine, engine.model, engine.optimizer, engine.data)}
        self._passed |= {id(plugin) for plugin in engine.plugins.values()}
        taking_part = list(takes_part(engine))
        for plugin in engine.plugins.values() if everyone else taking_part:
            depth = DEEPEST if plugin in taking_part else 0
            for name, value in vars(plugin).items():
                place = (plugin.name, name)
                if isinstance(value, Tensor) and value.device == self._device:
                    self.held[plugin, name] = value
                    self.known[place] = value.shape, value.dtype
                else:
                    self._look(place, value, depth)
        for number, module in enumerate(engine.model.modules()):
            self._look_at_module(number, module)

    @property
    def key(self) -> tuple[object, ...]:
        """Everything, as a comparable key."""
        return (*self.known, *self.known.values())

    def _look(self, place: Place, value: Any, depth: int) -> None:
        """Note what a value is, or what is in it."""
        if type(value) in PLAIN:
            self.known[place] = value
        elif isinstance(value, Tensor):
            self.known[place] = _of_tensor(value)
            self._alive.append(value)
        elif isinstance(value, torch.Generator):
            if value.device.type == self._device.type:
                self.generators.append(value)
        elif depth and id(value) not in self._passed:
            self._passed.add(id(value))
            parts = list(_parts(value))
            self.known[(*place, "")] = len(parts)
            for name, part in parts[:LONGEST]:
                self._look((*place, name), part, depth - 1)

    def _look_at_module(self, number: int, module: nn.Module) -> None:
        """Record a module's own state, apart from submodules."""
        for name, value in vars(module).items():
            place = (number, type(module).__name__, name)
            if name in ("_parameters", "_buffers"):
                self.known[place] = tuple(
                    (own.data_ptr(), own.requires_grad) for own in value.values() if own is not None
                )
            elif name not in OF_MODULES:
                self._look(place, value, 2)
            elif name.endswith("_hooks"):
                self.known[place] = len(value)


def takes_part(engine: Engine) -> Iterator[Plugin[Any]]:
    """The plugins that implement a hook of the gradient computation."""
    for plugin in engine.plugins.values():
        if any(hasattr(getattr(plugin, hook, None), "nexus_impl") for hook in HOOKS):
            yield plugin


def changed(before: Knowledge, after: Knowledge) -> str:
    """The first change, in words; plugin tensors may be added or replaced.

    Returns:
        Empty if nothing changed.
    """
    arrived = {(plugin.name, name) for plugin, name in after.held}
    for place in {**before.known, **after.known}:
        if before.known.get(place) != after.known.get(place) and place[:2] not in arrived:
            return _in_words(place)
    return ""


def _in_words(place: Place) -> str:
    if isinstance(place[0], int):
        return f"'{place[2]}' of a module {place[1]}"
    return f"'{place[1]}' of the plugin '{place[0]}'"


def _of_tensor(tensor: Tensor) -> tuple[object, ...]:
    """What tells a tensor from another; of a small one on the host what it holds too."""
    facts = (tensor.shape, tensor.dtype, tensor.requires_grad)
    if tensor.is_cpu and tensor.numel() <= SMALL:
        return (*facts, repr(tensor.tolist()))
    return (*facts, tensor.data_ptr() if tensor.layout is torch.strided else id(tensor))


def _parts(value: Any) -> Iterator[tuple[object, object]]:
    """What an object is made of, by name or place."""
    if isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, list | tuple | deque):
        yield from enumerate(value)
    elif isinstance(value, set | frozenset):
        yield from enumerate(sorted(map(repr, value)))
    elif isinstance(value, np.ndarray | np.generic):
        yield "array", value.tobytes()
    elif not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).items()


@contextmanager
def watching(engine: Engine, step: Step, module: Any) -> Iterator[list[str]]:
    """Detect host side effects in a block, which a graph of the block would not repeat.

    Args:
        engine: of the run.
        step: that the block belongs to.
        module: of the device, such as `torch.cuda`.

    Yields:
        The side effects, in words; complete when the block exits.
    """
    found: list[str] = []
    before, drawn = Knowledge(engine, everyone=True), _drawn()
    with ExitStack() as watches:
        watches.enter_context(_waits(module, found))
        watches.enter_context(_reads(engine.state, found))
        watches.enter_context(_reads(step, found, "number"))
        yield found
    if _drawn() != drawn:
        found.append("random numbers are drawn on the host")
    if what := changed(before, Knowledge(engine, everyone=True)):
        found.append(f"the host changes {what}")


def _drawn() -> tuple[object, ...]:
    """The state of the host's generators."""
    words = np.random.get_state(legacy=False)["state"]
    return random.getstate(), str(words), torch.get_rng_state().numpy().tobytes()


@contextmanager
def _waits(module: Any, found: list[str]) -> Iterator[None]:
    """Record where the host syncs with the device, if the device's module can report it."""
    if not hasattr(module, "set_sync_debug_mode"):
        yield
        return
    before = module.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            module.set_sync_debug_mode(before)
    for each in said:
        if "synchronizing" in str(each.message):
            found.append(f"the host waits for the device at {_line(each.filename, each.lineno)}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@contextmanager
def _reads(owner: Any, found: list[str], *names: str) -> Iterator[None]:
    """Record which fields of an object are read: a graph would freeze their values."""
    kind, fields = type(owner), [field.name for field in dataclasses.fields(owner)]

    def reader(name: str) -> property:
        def read(self: Any) -> object:
            found.append(f"how far the run is, is read at {_reader(sys._getframe(1))}")
            return self.__dict__[name]

        return property(read)

    watched = {name: reader(name) for name in names or fields}
    owner.__class__ = type(kind.__name__, (kind,), watched)
    try:
        yield
    finally:
        owner.__class__ = kind


def _reader(frame: FrameType | None) -> str:
    """The innermost line that is not the core's own."""
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(OURS):
        frame = frame.f_back
    return _line(frame.f_code.co_filename, frame.f_lineno) if frame else "an unknown place"


def _line(file: str, number: int) -> str:
    return f"{Path(file).name}:{number}"
