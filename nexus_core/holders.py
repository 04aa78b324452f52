"""The parts of a loader, and the states that record its position."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, TypedDict

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from nexus_core.device import RandomState

__all__ = [
    "ITERATOR",
    "LOADER",
    "Access",
    "Held",
    "Place",
    "States",
    "access_to",
    "nowhere",
    "parts_of",
    "read",
    "teller_of",
    "write",
]

LOADER, ITERATOR = "loader", "iterator"
_ACCESS = (("state_dict", "load_state_dict"), ("get_state", "set_state"))
_PARTS = ("batch_sampler", "sampler", "dataset", "generator")
_DEPTH = 3  # of nested parts

States: TypeAlias = dict[str, Any]
"""The states of a loader's parts, by path: "loader", "loader.sampler"."""

Access: TypeAlias = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Functions that read and restore the state of a part."""


class Held(TypedDict):
    """A loader's position in an epoch: its own state, and how to reread up to it."""

    now: States  # of the part that tells the position; empty if none does
    start: States  # of all its parts at the start of the epoch
    random: RandomState | None  # the random generators at that time
    next: str | None  # digest of the batch after the position, if it was read
    draws: bool  # whether reading a batch draws random numbers in this process


class Place(NamedTuple):
    """A run's position in its data: the cursor after a micro-batch."""

    epoch: int
    batch: int
    row: int = 0
    held: Held | None = None


def nowhere() -> Held:
    """The position in data of which nothing is known."""
    return {"now": {}, "start": {}, "random": None, "next": None, "draws": False}


def parts_of(data: object) -> dict[str, object]:
    """A loader and what it reads from, each once, by path."""
    found: dict[str, object] = {}
    waiting: list[tuple[str, object]] = [(LOADER, data)]
    for path, part in waiting:
        if part is None or any(part is known for known in found.values()):
            continue
        found[path] = part
        if path.count(".") < _DEPTH:
            waiting += [(f"{path}.{name}", getattr(part, name, None)) for name in _PARTS]
    return found


def teller_of(data: object) -> object:
    """The part that records how far a loader was read; the loader itself if it has workers."""
    if not isinstance(data, DataLoader) or access_to(data) or data.num_workers:
        return data
    if isinstance(data.dataset, IterableDataset):
        return data.dataset
    batches = data.batch_sampler
    if not isinstance(batches, BatchSampler) or type(batches) is not BatchSampler:
        return batches or data.sampler
    return batches.sampler


def access_to(part: object) -> Access | None:
    """Functions to read and restore a part's state without arguments, if it has them."""
    draws = isinstance(part, Iterator | torch.Generator)
    for names in _ACCESS if draws else _ACCESS[:1]:
        get, put = (getattr(part, name, None) for name in names)
        if callable(get) and callable(put) and _needs_nothing(get):
            return get, put
    return None


def _needs_nothing(method: Callable[..., Any]) -> bool:
    """Whether a method needs no arguments; some data sets' methods take the position."""
    if inspect.isbuiltin(method):
        return True
    filled = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(method).parameters.values()
    return all(one.default is not one.empty or one.kind in filled for one in given)


def read(parts: Mapping[str, Access]) -> States:
    """The current states of the parts, as values that later reads do not change."""
    return {name: _plain(get()) for name, (get, _) in parts.items()}


def write(parts: Mapping[str, Access], states: States) -> None:
    """Restore the parts for which there is a state."""
    for name in parts.keys() & states.keys():
        parts[name][1](copy.deepcopy(states[name]))


def _plain(value: Any) -> Any:
    """A copy of a state, with NumPy numbers turned into Python ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value)) if isinstance(value, tuple) else list(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else copy.deepcopy(value)
