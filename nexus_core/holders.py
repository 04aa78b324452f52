"""The parts of a loader, and what they say of the place where it is."""

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
_DEPTH = 3  # of parts within parts

States: TypeAlias = dict[str, Any]
"""What parts of a loader say of themselves, by their path: "loader", "loader.sampler"."""

Access: TypeAlias = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How the state of a part is read, and how it is put back."""


class Held(TypedDict):
    """Where a loader is in an epoch: what it says itself, and how to read up to there again."""

    now: States  # of the part that tells the place; none where nothing does
    start: States  # of all its parts as the epoch began
    random: RandomState | None  # the generators then
    next: str | None  # digest of the batch after the place, where it had been read
    draws: bool  # whether reading a batch draws random numbers in this process


class Place(NamedTuple):
    """Where a run is in its data: the cursor after a micro-batch."""

    epoch: int
    batch: int
    row: int = 0
    held: Held | None = None


def nowhere() -> Held:
    """The place of data of which nothing is known."""
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
    """What knows how far a loader has been read: of one with workers, which are ahead, itself."""
    if not isinstance(data, DataLoader) or access_to(data) or data.num_workers:
        return data
    if isinstance(data.dataset, IterableDataset):
        return data.dataset
    batches = data.batch_sampler
    if not isinstance(batches, BatchSampler) or type(batches) is not BatchSampler:
        return batches or data.sampler
    return batches.sampler


def access_to(part: object) -> Access | None:
    """How the state of a part is read and put back, without further arguments."""
    draws = isinstance(part, Iterator | torch.Generator)
    for names in _ACCESS if draws else _ACCESS[:1]:
        get, put = (getattr(part, name, None) for name in names)
        if callable(get) and callable(put) and _needs_nothing(get):
            return get, put
    return None


def _needs_nothing(method: Callable[..., Any]) -> bool:
    """Whether a method can be called as it is; some data sets want to be told how far they are."""
    if inspect.isbuiltin(method):
        return True
    filled = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(method).parameters.values()
    return all(one.default is not one.empty or one.kind in filled for one in given)


def read(parts: Mapping[str, Access]) -> States:
    """What parts say of themselves now, as values that later reads leave."""
    return {name: _plain(get()) for name, (get, _) in parts.items()}


def write(parts: Mapping[str, Access], states: States) -> None:
    """Put those parts back that there are states of."""
    for name in parts.keys() & states.keys():
        parts[name][1](copy.deepcopy(states[name]))


def _plain(value: Any) -> Any:
    """A copy of a state that later reads leave, with Python's numbers for those of NumPy."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value)) if isinstance(value, tuple) else list(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else copy.deepcopy(value)
