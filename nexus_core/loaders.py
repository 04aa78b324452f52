"""Optional loader capabilities: seek, save their position, be told the epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from nexus_core.batches import Batch, digest
from nexus_core.device import RandomState, random_state, set_random_state
from nexus_core.errors import ConfigError
from nexus_core.holders import (
    ITERATOR,
    LOADER,
    Held,
    Place,
    States,
    access_to,
    nowhere,
    parts_of,
    read,
    teller_of,
    write,
)

__all__ = ["Seekable", "Source", "can_seek", "is_same", "length_of", "say"]

_NO_LENGTH = (TypeError, NotImplementedError, AttributeError, RuntimeError)


class Seekable(Protocol):
    """Data that can start anywhere in an epoch without replaying what came before.

    It may also have `batches_from_row(epoch, row)` and `batch_size`, to resume at the right row
    with a different batch size; `is_borrowed(row)`, which tells that this rank has no row of its
    own in that batch and gets one that must not count; and a `fingerprint` of its contents.
    """

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class AstrayError(Exception):
    """Data is not at the position that its state should have restored."""


def check_batches(data: object) -> None:
    """Reject data whose items are rows, and data that cannot be read batch by batch.

    Raises:
        ConfigError: it is such a data set, or no data.
    """
    rows = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    reads = any(hasattr(data, name) for name in ("__iter__", "__getitem__", "batches"))
    if rows or not reads or isinstance(data, Mapping | torch.nn.Module):
        raise ConfigError(
            f"the data is a {type(data).__name__}, which yields {'rows' if rows else 'no batches'}"
            "; pass batches: ResumableLoader(data, batch_size=32), a DataLoader (batch_size=None "
            "if the items are batches), or a list of them"
        )


class Source:
    """Data as the engine reads it: opened at any position, and able to save it after each batch.

    Seekable data starts at the position. For other data, the part that determines its order is
    asked for its state after each batch: the loader itself, its iterator, or what a `DataLoader`
    without workers reads from. If that has no state, or does not return to its position, the epoch
    is reread from its start, with its parts and the random generators as they were then: so a
    shuffling `DataLoader` reproduces its order.

    Attributes:
        data: the batches.
        is_iterator: it can only be read once, from its current position.
        size: rows per batch over all ranks, if the data can seek and says so.

    Args:
        data: see the attribute.

    Raises:
        ConfigError: it yields rows instead of batches.
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        check_batches(data)
        self.data = data
        self.is_iterator = isinstance(data, Iterator)
        self.size: int | None = getattr(data, "batch_size", None) if can_seek(data) else None
        self._is_numbered = can_seek(data) or isinstance(data, list | tuple)
        self._parts = parts_of(data)
        parts = {} if can_seek(data) else self._parts
        self._stateful = {name: found for name, part in parts.items() if (found := access_to(part))}
        self._tells = {
            n: self._stateful[n]
            for n, part in parts.items()
            if part is teller_of(data) and n in self._stateful
        }
        self._start: States = {}
        self._random: RandomState | None = None
        self._draws = self._measures = False
        self._untouched = True  # since its parts' initial states were read

    def tell_epoch(self, epoch: int) -> None:
        """Call `set_epoch` of a loader, its samplers and its data sets, each once."""
        for part in self._parts.values():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    @property
    def tells(self) -> bool:
        """Whether the data reports its own position."""
        return bool(self._tells)

    def shares(self, other: object) -> bool:
        """Whether reading other data moves this data's position."""
        own = {id(self._parts[name]) for name in self._tells.keys() & self._parts.keys()}
        return any(id(part) in own for part in parts_of(other).values())

    def rewind(self) -> None:
        """Restore all parts to the start of the epoch."""
        write(self._stateful, self._start)

    def begin(self) -> Held | None:
        """The position before the first batch of an epoch; None: its number suffices."""
        begins_anew = self._untouched and isinstance(self.data, DataLoader)
        asked = {n: a for n, a in self._stateful.items() if not (begins_anew and n == LOADER)}
        self._start, self._random = read(asked), None
        return self._held({})

    def hold(self) -> Held | None:
        """The position after the last batch read, as values that later reads do not change."""
        return None if self._is_numbered else self._held(read(self._tells))

    def open(self, place: Place) -> Iterator[Batch]:
        """The batches from a position on."""
        if can_seek(self.data):
            return self._sought(self.data, place)
        held, before = place.held or nowhere(), random_state()
        start = {} if self._untouched and held["start"] is self._start else held["start"]
        self._untouched, self._start, self._draws = False, held["start"], held["draws"]
        self._measures = LOADER not in self._tells  # it may draw its seeds with the first batch
        self._random = held["random"] if place.batch else before
        if self.is_iterator:
            write(self._stateful, held["now"])
            return iter(self.data)
        ways = [({name: start[name] for name in start if name != LOADER}, place.batch)]
        if LOADER in start:
            ways.insert(0, (start, place.batch))
        if held["now"]:
            ways.insert(0, (held["now"], 0))
        for states, skipped in ways[:-1]:
            try:
                return self._opened(place, held, states, skipped, before)
            except Exception as error:  # errors of the data itself will occur again
                reason = " ".join((str(error) or repr(error)).split())[:200]
                say(
                    f"this data does not return to its position by its own state ({reason}); it is "
                    "reread from the start of the epoch"
                )
                set_random_state(before)
        return self._opened(place, held, *ways[-1], before)

    def read(self, batches: Iterator[Batch], end: Batch) -> Batch:
        """The next batch; notes whether it drew random numbers; `end` after the last."""
        if not self._tells:
            return next(batches, end)
        before = torch.get_rng_state()
        batch = next(batches, end)
        if self._measures:
            self._draws = not torch.equal(before, torch.get_rng_state())
        self._measures = True
        return batch

    def number(self, row: int) -> int:
        """The number of batches before a row in an epoch, counted from its end."""
        return length_of(self.data) - -(-(self._rows() - row) // (self.size or 1))

    def row_after(self, row: int) -> int:
        """The row after the batch at a row."""
        return min(row + self.size, self._rows()) if self.size else 0

    def is_borrowed(self, row: int) -> bool:
        """Whether this rank has no row of its own in the batch at a row."""
        asks = getattr(self.data, "is_borrowed", None)
        return bool(asks(row)) if asks else False

    def _held(self, now: States) -> Held | None:
        if self._is_numbered:
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
        """The batches from a position on, by states; skipped ones draw the same random numbers.

        Raises:
            AstrayError: the position does not match.
        """
        if skipped and held["random"] is not None:
            set_random_state(held["random"])
        batches = self._iterated(states)
        next(islice(batches, skipped, skipped), None)  # at most to their end
        drawn = held["next"] is not None or not held["draws"]
        early = drawn if place.batch else LOADER in states  # to check whether the state is valid
        first = list(islice(batches, 1)) if early and states and not skipped else []
        if place.batch:
            set_random_state(before)
        if not skipped and held["next"] not in (None, *map(digest, first)):
            raise AstrayError("a different batch comes next; the state may lack a shuffle buffer")
        return chain(first, batches)

    def _iterated(self, states: States) -> Iterator[Batch]:
        """An iterator over the data from these states on."""
        write(self._stateful, states)
        batches = iter(self.data)
        if not self._stateful and (found := access_to(batches)):
            self._tells = {ITERATOR: found}
            write(self._tells, states)
        return batches

    def _rows(self) -> int:
        return length_of(getattr(self.data, "dataset", ()))


def can_seek(data: object) -> TypeGuard[Seekable]:
    """Whether data can start anywhere in an epoch: it has a method `batches`."""
    return callable(getattr(data, "batches", None))


def is_same(data: Iterable[Batch], last: Iterable[Batch] | None) -> bool | None:
    """Whether data is what was read last, or another loader over it; None: nothing was read."""
    if last is None:
        return None
    owner = getattr(data, "dataset", None)
    return data is last or (owner is not None and owner is getattr(last, "dataset", None))


def length_of(data: object) -> int:
    """The length of data, 0 if unknown."""
    if isinstance(data, Iterator) or not hasattr(data, "__len__"):
        return 0
    try:
        return len(cast(Any, data))
    except _NO_LENGTH:
        return 0


def say(text: str) -> None:
    """Warn the user about the data."""
    warnings.warn(text, RuntimeWarning, stacklevel=3)
