"""Host side effects in a step, which a graph would not repeat."""

from __future__ import annotations

import dataclasses
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim import Optimizer

from nexus_core.optimizers import members
from nexus_plugins.compile.facts import Knowledge, Settings, changed

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["watching", "watching_update"]

OURS = ("nexus_core.", "nexus_plugins.compile", "torch.")
PROGRESS = "the progress of the run is read"
DRAWN = "random numbers are drawn on the host"


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
    before = Knowledge(engine, everyone=True)
    drawn = _drawn(before.host_generators)
    with ExitStack() as watches:
        watches.enter_context(_waits(module, found))
        fields = [field.name for field in dataclasses.fields(engine.state)]
        watches.enter_context(_reads(engine.state, fields, PROGRESS, found))
        watches.enter_context(_reads(step, ["number"], PROGRESS, found))
        watches.enter_context(_reads(engine, ["metrics"], "a metric is read", found))
        watches.enter_context(_reads(engine, ["plugins"], "another plugin is read", found))
        for optimizer in members(engine.optimizer).values():
            said = "a setting of the optimizer is read"
            watches.enter_context(_reads(optimizer, ["param_groups"], said, found, directly=True))
        for hook in ("on_note", "on_image"):
            watches.enter_context(_notes(vars(engine.hook), hook, found))
        yield found
    if _drawn(before.host_generators) != drawn:
        found.append(DRAWN)
    after = Knowledge(engine, everyone=True)
    if what := changed(before.known, after.known, but=after.held):
        found.append(f"the host changes {what}")


@contextmanager
def watching_update(optimizer: Optimizer, device: torch.device, module: Any) -> Iterator[list[str]]:
    """The same for an update.

    Args:
        optimizer: makes the update, without its hooks.
        device: of the run.
        module: of the device.

    Yields:
        The side effects, in words; complete when the block exits.
    """
    found: list[str] = []
    before, drawn = Settings(optimizer, device, everything=True), _drawn(())
    with _waits(module, found):
        yield found
    if _drawn(()) != drawn:
        found.append(DRAWN)
    after = Settings(optimizer, device, everything=True).known
    if what := changed(before.known, {place: after.get(place) for place in before.known}):
        found.append(f"the host changes {what}")
    elif before.refusal:
        found.append(before.refusal)


def _drawn(generators: Iterable[Any]) -> list[object]:
    """The state of the host's generators, and of some others."""
    words = np.random.get_state(legacy=False)
    return [random.getstate(), str(words), *map(_state, (torch.default_generator, *generators))]


def _state(generator: Any) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    return pickle.dumps(generator)  # of NumPy


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
def _reads(
    owner: Any, names: list[str], what: str, found: list[str], directly: bool = False
) -> Iterator[None]:
    """Record where attributes of an object are read: a graph would freeze their values.

    Args:
        owner: the object.
        names: of its attributes.
        what: such a read, in words.
        found: is added to.
        directly: ignore reads of the core and of PyTorch, such as in `engine.parameters()`.
    """
    kind = type(owner)

    def reader(name: str) -> property:
        def read(self: Any) -> object:
            caller = sys._getframe(1)
            if not (directly and _is_ours(caller)):
                found.append(f"{what} at {_reader(caller)}")
            return vars(self)[name]

        return property(read)

    owner.__class__ = type(kind.__name__, (kind,), {name: reader(name) for name in names})
    try:
        yield
    finally:
        owner.__class__ = kind


@contextmanager
def _notes(hooks: dict[str, Callable[..., Any]], name: str, found: list[str]) -> Iterator[None]:
    """Record where something is said through a hook: a graph would say nothing."""
    hook = hooks[name]

    def said(**given: Any) -> Any:
        found.append(f"{name} is called at {_reader(sys._getframe(1))}")
        return hook(**given)

    hooks[name] = said
    try:
        yield
    finally:
        hooks[name] = hook


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(OURS)


def _reader(frame: FrameType | None) -> str:
    """The innermost line that is not the core's own."""
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    return _line(frame.f_code.co_filename, frame.f_lineno) if frame else "an unknown place"


def _line(file: str, number: int) -> str:
    return f"{Path(file).name}:{number}"
