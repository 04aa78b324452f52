"""What loaders may be able to do: start anywhere, hold their place, be told the epoch."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict, TypeGuard, cast

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from nexus_core.batches import Batch, digest
from nexus_core.device import RandomState, random_state, set_random_state

__all__ = ["Held", "Place", "Seekable", "Source", "can_seek", "is_same", "length_of", "say"]

_NO_LENGTH = (TypeError, NotImplementedError, AttributeError, RuntimeError)
_ACCESS = (("state_dict", "load_state_dict"), ("get_state", "set_state"))
_PARTS = ("batch_sampler", "sampler", "dataset", "generator")
_DEPTH = 3  # of parts within parts
_LOADER, _ITERATOR = "loader", "iterator"

States: TypeAlias = dict[str, Any]
"""What parts of a loader say of themselves, by their path: "loader", "loader.sampler"."""

Access: TypeAlias = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How the state of a part is read, and how it is put back."""


class Seekable(Protocol):
    """Data that starts anywhere in an epoch without replaying what came before.

    It may also have `batches_from_row(epoch, row)` and `batch_size`, to resume at the right row
    with another batch size; `is_borrowed(row)`, which tells that this process has no row of the
    batch there and gets one that must not count; and a `fingerprint` of what it holds.
    """

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


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


class AstrayError(Exception):
    """Data is not where its state should have brought it."""


class Source:
    """Data as the engine reads it: opened at any place, with a place to hold after each batch.

    Data that can seek starts at the place. Of other data the part that decides its order is asked
    for its place after each batch: the loader itself, its iterator, or what a `DataLoader` without
    workers reads from. What cannot tell, or does not come back to where it was, is read again from
    the beginning of the epoch, with its parts and the random generators as they were then: so a
    shuffling `DataLoader` comes back to its order.

    Attributes:
        data: the batches.
        is_iterator: it is read once, from where it stands.
        size: rows of a batch, over all processes, where the data can seek and says so.

    Args:
        data: as the attribute.
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        self.data = data
        self.is_iterator = isinstance(data, Iterator)
        self.size: int | None = getattr(data, "batch_size", None) if can_seek(data) else None
        self._parts = _parts_of(data)
        parts = {} if can_seek(data) else self._parts
        self._stateful = {name: found for name, part in parts.items() if (found := _access(part))}
        self._tells = {
            n: self._stateful[n]
            for n, part in parts.items()
            if part is _teller(data) and n in self._stateful
        }
        self._start: States = {}
        self._random: RandomState | None = None
        self._draws = False
        self._untouched = True  # since its parts were asked how they begin

    def tell_epoch(self, epoch: int) -> None:
        """Call `set_epoch` of a loader, its samplers and its data sets, each once."""
        for part in self._parts.values():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    @property
    def tells(self) -> bool:
        """Whether the data says itself where it is."""
        return bool(self._tells)

    def shares(self, other: object) -> bool:
        """Whether reading other data moves the place that this data tells."""
        own = {id(self._parts[name]) for name in self._tells.keys() & self._parts.keys()}
        return any(id(part) in own for part in _parts_of(other).values())

    def begin(self) -> Held | None:
        """The place before the first batch of an epoch; None: it is known by its number."""
        begins_anew = self._untouched and isinstance(self.data, DataLoader)
        asked = {n: a for n, a in self._stateful.items() if not (begins_anew and n == _LOADER)}
        self._start, self._random = _read(asked), None
        return self._held({})

    def hold(self) -> Held | None:
        """The place after the batch that was read last, as values that later reads leave."""
        return self._held(_read(self._tells))

    def open(self, place: Place) -> Iterator[Batch]:
        """The batches from a place on."""
        if can_seek(self.data):
            return self._sought(self.data, place)
        held, before = place.held or _nowhere(), random_state()
        start = {} if self._untouched and held["start"] is self._start else held["start"]
        self._untouched, self._start = False, held["start"]
        self._random = held["random"] if place.batch else before
        if self.is_iterator and not held["now"]:
            return iter(self.data)
        ways = [(held["now"], 0)] if held["now"] else []
        ways += [(start, place.batch), ({n: start[n] for n in start if n != _LOADER}, place.batch)]
        for states, skipped in ways[: None if _LOADER in start else -1][:-1]:
            try:
                return self._opened(place, held, states, skipped, before)
            except Exception as error:  # what is wrong with the data itself will come up again
                say(
                    "this data does not come back to its place by its own state "
                    f"({error or repr(error)}); it is read again from the beginning of the epoch"
                )
                set_random_state(before)
        return self._opened(place, held, *ways[-1], before)

    def read(self, batches: Iterator[Batch], end: Batch) -> Batch:
        """The next batch, and whether it took random numbers; `end` where there is none."""
        if not self._tells:
            return next(batches, end)
        before = torch.get_rng_state()
        batch = next(batches, end)
        self._draws = not torch.equal(before, torch.get_rng_state())
        return batch

    def number(self, row: int) -> int:
        """How many batches of this size an epoch has before a row, counted from its end."""
        return length_of(self.data) - -(-(self._rows() - row) // (self.size or 1))

    def row_after(self, row: int) -> int:
        """The row after the batch at a row."""
        return min(row + self.size, self._rows()) if self.size else 0

    def is_borrowed(self, row: int) -> bool:
        """Whether this process has no row of its own in the batch at a row."""
        asks = getattr(self.data, "is_borrowed", None)
        return bool(asks(row)) if asks else False

    def _held(self, now: States) -> Held | None:
        if can_seek(self.data) or isinstance(self.data, list | tuple):
            return None
        start, random = self._start, self._random
        return {"now": now, "start": start, "random": random, "next": None, "draws": self._draws}

    def _sought(self, data: Seekable, place: Place) -> Iterator[Batch]:
        if self.size and place.row and place.row != place.batch * self.size:
            batches: Iterator[Batch] = cast(Any, data).batches_from_row(place.epoch, place.row)
            return batches
        return data.batches(place.epoch, place.batch)

    def _opened(
        self, place: Place, held: Held, states: States, skipped: int, before: RandomState
    ) -> Iterator[Batch]:
        """The batches from a place on, by states; some are passed over, drawing what they drew.

        Raises:
            AstrayError: it is not the place.
        """
        if skipped and held["random"] is not None:
            set_random_state(held["random"])
        batches = self._iterated(states)
        for _ in range(skipped):
            next(batches, None)
        drawn = held["next"] is not None or not held["draws"]  # what the next batch draws
        first = list(islice(batches, 1)) if states and drawn and not skipped else []
        if place.batch:
            set_random_state(before)
        if first and not skipped and held["next"] not in (None, digest(first[0])):
            raise AstrayError("another batch comes next, as where it lacks a shuffle buffer")
        return chain(first, batches)

    def _iterated(self, states: States) -> Iterator[Batch]:
        """An iterator of the data, from where these states say."""
        _write(self._stateful, states)
        batches = iter(self.data)
        found = None if self.is_iterator or self._stateful else _access(batches)
        if found:
            self._tells = {_ITERATOR: found}
            _write(self._tells, states)
        return batches

    def _rows(self) -> int:
        return length_of(getattr(self.data, "dataset", ()))


def _nowhere() -> Held:
    return {"now": {}, "start": {}, "random": None, "next": None, "draws": False}


def can_seek(data: object) -> TypeGuard[Seekable]:
    """Whether data starts anywhere in an epoch: it has a method `batches`."""
    return callable(getattr(data, "batches", None))


def is_same(data: Iterable[Batch], last: Iterable[Batch] | None) -> bool | None:
    """Whether data is what was read last, or another loader of it; None: nothing was read."""
    if last is None:
        return None
    owner = getattr(data, "dataset", None)
    return data is last or (owner is not None and owner is getattr(last, "dataset", None))


def length_of(data: object) -> int:
    """The length of data, 0 where it does not say, or cannot."""
    if isinstance(data, Iterator) or not hasattr(data, "__len__"):
        return 0
    try:
        return len(cast(Any, data))
    except _NO_LENGTH:
        return 0


def say(text: str) -> None:
    """Say what the user should know of the data."""
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _parts_of(data: object) -> dict[str, object]:
    """A loader and what it reads from, each once, by path."""
    found: dict[str, object] = {}
    waiting: list[tuple[str, object]] = [(_LOADER, data)]
    for path, part in waiting:
        if part is None or any(part is known for known in found.values()):
            continue
        found[path] = part
        if path.count(".") < _DEPTH:
            waiting += [(f"{path}.{name}", getattr(part, name, None)) for name in _PARTS]
    return found


def _teller(data: object) -> object:
    """What knows how far a loader has been read: of one with workers, which are ahead, itself."""
    if not isinstance(data, DataLoader) or _access(data) or data.num_workers:
        return data
    if isinstance(data.dataset, IterableDataset):
        return data.dataset
    batches = data.batch_sampler
    if isinstance(batches, BatchSampler) and type(batches) is BatchSampler and not _access(batches):
        return batches.sampler
    return batches or data.sampler


def _access(part: object) -> Access | None:
    """How the state of a part is read and put back, without further arguments."""
    for names in _ACCESS:
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


def _read(parts: Mapping[str, Access]) -> States:
    return {name: _plain(get()) for name, (get, _) in parts.items()}


def _write(parts: Mapping[str, Access], states: States) -> None:
    for name in parts.keys() & states.keys():
        parts[name][1](copy.deepcopy(states[name]))


def _plain(value: Any) -> Any:
    """A copy of a state that later reads leave, with Python's numbers for those of NumPy."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value)) if isinstance(value, tuple) else list(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else copy.deepcopy(value)
