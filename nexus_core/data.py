"""Batches of any make, and the stream of them that a run reads from where its cursor is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypedDict, TypeGuard, cast

from torch import Tensor

from nexus_core.batches import Batch, copied, digest, leaves
from nexus_core.device import random_state, set_random_state
from nexus_core.errors import ConfigError, DataError
from nexus_core.intervals import Interval, TrainState
from nexus_core.plugin import StateDict

__all__ = [
    "Codec",
    "DataState",
    "Micro",
    "RunData",
    "Seekable",
    "Stream",
    "can_seek",
    "holds_its_place",
    "is_same",
    "length_of",
]

_NO_LENGTH = (TypeError, NotImplementedError, AttributeError, RuntimeError)
_LOOKS = 16  # batches until a loader is trusted not to write over them
_END: Batch = object()  # after the last batch


class Codec(Protocol):
    """What turns the ids of a data set into something a person reads: a tokenizer."""

    @property
    def size(self) -> int: ...  # how many distinct ids there are
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Seekable(Protocol):
    """Data that starts anywhere in an epoch without replaying what came before.

    It may also have `batches_from_row(epoch, row)` and `batch_size`, to resume at the right row
    with another batch size; `is_borrowed(row)`, which tells that this process has no row of the
    batch there and gets one that must not count; and a `fingerprint` of what it holds.
    """

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Stateful(Protocol):
    """Data that holds its own place, as the loaders of torchdata and streams of datasets do."""

    def state_dict(self) -> StateDict: ...
    def load_state_dict(self, state: StateDict) -> Any: ...


@dataclass(frozen=True)
class RunData:
    """What `make_data` answers; `valid` goes by the prefix of its metrics: "val"."""

    train: Iterable[Batch]
    valid: Mapping[str, Iterable[Batch]] = field(default_factory=dict)
    codec: Codec | None = None


class Micro(NamedTuple):
    """A micro-batch: what one forward and backward pass sees.

    Args:
        batch: its rows.
        share: of a batch that was cut, the part of its rows that is here; else 1.
        borrowed: a row that another process trains on too, read so that this one takes part; it
            has no units and no loss.
    """

    batch: Batch
    share: float = 1.0
    borrowed: bool = False


class DataState(TypedDict):
    """What a snapshot keeps of the data, besides the counters."""

    fingerprint: str | None
    batch_size: int | None  # rows of a batch, over all processes
    row: int  # rows read within the epoch, where the batch size is known
    loader: StateDict | None  # of a loader that holds its own place


class Place(NamedTuple):
    """Where a run is in its data: the cursor after a micro-batch."""

    epoch: int
    batch: int
    row: int = 0
    loader: StateDict | None = None


class Stream:
    """The micro-batches of a run, from its cursor on, epoch after epoch.

    It reads a batch ahead only to see whether an epoch is over: after the last batch of data that
    says its length, and always for data that does not.

    Args:
        data: batches; what it can do is found by what it has (see `Seekable`, `Stateful`).
        state: the counters of the run, read once.
        saved: what is known of the data that the cursor was in; None: nothing.
        known: whether this is the very data that the cursor is in; None: a new process cannot tell.
        ends_with_epoch: the last step of an epoch takes what is left of it, and no more.

    Raises:
        DataError: there is not a single batch.
    """

    def __init__(
        self,
        data: Iterable[Batch],
        state: TrainState,
        saved: DataState | None,
        known: bool | None,
        ends_with_epoch: bool = False,
    ) -> None:
        self.data = data
        self._ends_with_epoch = ends_with_epoch
        self.length = length_of(data)
        self._size: int | None = getattr(data, "batch_size", None)
        self._seeks, self._holds = can_seek(data), holds_its_place(data)
        self._asks = getattr(data, "is_borrowed", None)
        self._print = fingerprint(data)
        self.place = Place(state.epoch, state.batch)
        self._returned: list[Micro] = []
        self._waits = False  # a micro-batch waits for others to be read before it is computed
        self._memory: list[tuple[set[int], Batch]] = []
        self._reuses: bool | None = None  # whether the loader writes over earlier batches
        if saved is not None and (state.batch or saved["loader"]):
            self._settle(state, saved, known)
        self._batches = self._read()

    def take(self, count: int, horizon: Interval) -> list[Micro]:
        """The next micro-batches, fewer where the horizon, in epochs, comes first."""
        taken, start = list[Micro](), self.place
        self._waits = count > 1
        try:
            while len(taken) < count and not self._passed(horizon):
                if self._ends_with_epoch and taken and self.place.batch == 0:
                    break
                if self._returned:
                    taken.append(self._returned.pop(0))
                    self.place = self.place._replace(batch=self.place.batch + 1)
                    continue
                micro, self.place = next(self._batches)
                if micro is not None:
                    taken.append(micro)
        except BaseException:
            self._batches = self._read()  # a generator that raised is at its end
            self.give_back(taken, start)
            raise
        return taken

    def close(self) -> None:
        """Give up reading, so that the data may be read by others at once."""
        self._batches.close()

    def give_back(self, taken: Sequence[Micro], place: Place) -> None:
        """Return micro-batches that were not trained on, where they cannot be read again."""
        if isinstance(self.data, Iterator):
            self._returned = [*taken, *self._returned]
            self.place = place

    def state(self, place: Place) -> DataState:
        """What a snapshot keeps of the data, at a place in it."""
        return {
            "fingerprint": self._print,
            "batch_size": self._size if self._seeks else None,
            "row": place.row,
            "loader": place.loader,
        }

    def check(self, length: Interval) -> None:
        """Refuse a length that cannot be told in this data.

        Raises:
            ConfigError: it is part of an epoch, and the data does not say how long one is.
        """
        if length.unit == "epochs" and length.amount % 1 and not self.length:
            raise ConfigError(
                f"'{length}' is part of an epoch, and this data does not say how many batches "
                "an epoch has; give it a __len__, or count in steps"
            )

    def _passed(self, horizon: Interval) -> bool:
        if horizon.unit != "epochs":
            return False
        part = self.place.batch / self.length if self.length else 0.0
        return round(self.place.epoch + part, 9) >= horizon.amount

    def _settle(self, state: TrainState, saved: DataState, known: bool | None) -> None:
        """Find the cursor's place in this data: other data begins at its beginning."""
        before, now = saved["fingerprint"], self._print
        compared = before is not None and now is not None
        if not known and (before != now if compared else known is False):
            _say(
                f"the run was {state.batch} batches into an epoch of other data; this data begins "
                "at its first batch"
            )
            self.place = Place(state.epoch, 0)
            return
        self.place = Place(state.epoch, state.batch, saved["row"], saved["loader"])
        if isinstance(self.data, Iterator) and known is not True:
            _say(
                f"the run was {state.batch} batches into an epoch, and this data is an iterator, "
                "read from where it stands; data that can be read again resumes exactly"
            )
        if saved["batch_size"] not in (None, self._size) and hasattr(self.data, "batches_from_row"):
            self.place = self.place._replace(batch=self._number(saved["row"]))
            return
        if self.length and state.epoch_length not in (0, self.length):
            _say(
                f"the data had {state.epoch_length} batches an epoch and has {self.length} now; "
                f"the run continues at batch {state.batch} of the epoch"
            )

    def _read(self) -> Generator[tuple[Micro | None, Place]]:
        """Each micro-batch with the cursor after it; None with that of an end seen late."""
        while True:
            epoch = self.place.epoch
            _tell_epoch(self.data, epoch)
            number, row, batches = self._open(self.place)
            found, ahead = number, next(batches, _END)
            while ahead is not _END:
                reads_ahead = not (isinstance(self.data, Iterator) or 0 < self.length > number + 1)
                batch = self._kept(ahead) if reads_ahead or self._waits else ahead
                borrowed = self._borrowed(row)
                number, row = number + 1, self._row_after(row)
                held = self._held() if number != self.length else None
                last = False
                if reads_ahead:
                    ahead = self._ahead(batches, number)
                    last = ahead is _END
                place = Place(epoch, number, row, held)
                if last:
                    place = Place(epoch + 1, 0, 0, self._held())
                yield Micro(batch, borrowed=borrowed), place
                if not reads_ahead:
                    ahead = next(batches, _END)
            if self.place.epoch == epoch:
                self._ended_early(found, number)
                yield None, Place(epoch + 1, 0, 0, self._held())

    def _open(self, place: Place) -> tuple[int, int, Iterator[Batch]]:
        """Batches from a place on, with its number and row in the epoch."""
        data, size = self.data, self._size
        if isinstance(data, Iterator):
            return place.batch, 0, data
        if holds_its_place(data):
            if place.loader is not None:
                data.load_state_dict(place.loader)
            return place.batch, 0, self._from(place, 0 if place.loader else place.batch)
        if can_seek(data):
            if size and place.row and place.row != place.batch * size:
                batches = cast(Any, data).batches_from_row(place.epoch, place.row)
                return self._number(place.row), place.row, batches
            return place.batch, place.batch * (size or 0), data.batches(place.epoch, place.batch)
        return place.batch, 0, self._from(place, place.batch)

    def _from(self, place: Place, skipped: int) -> Iterator[Batch]:
        """The data without its first batches.

        Within an epoch, opening it and passing over what was read draws no random numbers: they
        were drawn when the epoch began.
        """
        if place.batch == 0:
            return iter(self.data)
        generators = random_state()
        batches = iter(self.data)
        for _ in range(skipped):
            next(batches, None)
        set_random_state(generators)
        return batches

    def _ahead(self, batches: Iterator[Batch], number: int) -> Batch:
        ahead = next(batches, _END)
        if ahead is not _END and number == self.length:
            _say(f"the data says that it has {self.length} batches, and has more; all are read")
            self.length = 0
        if ahead is _END and not self.length:
            self.length = number
        return ahead

    def _ended_early(self, found: int, number: int) -> None:
        """The data ended where its length, or that it cannot be read again, promised more."""
        if (number == found and not found) or (isinstance(self.data, Iterator) and number == found):
            raise DataError(
                f"the data ended after {number} batches; pass data that holds batches and can be "
                "read again, or an earlier horizon"
            )
        if number > found and self.length > number:
            _say(f"the data says that it has {self.length} batches, and has {number}")
        if number > found:
            self.length = 0 if isinstance(self.data, Iterator) else number

    def _kept(self, batch: Batch) -> Batch:
        """The batch, in memory of its own where the loader may write over it before its turn."""
        if self._reuses is None:
            mine = {t.data_ptr() for t in leaves(batch) if isinstance(t, Tensor) and t.numel()}
            if any(mine & others for others, _ in self._memory):
                self._reuses, self._memory = True, []
            elif len(self._memory) == _LOOKS:
                self._reuses, self._memory = False, []
            else:
                self._memory.append((mine, batch))  # held, so that its memory is not given away
        return batch if self._reuses is False else copied(batch)

    def _number(self, row: int) -> int:
        """How many batches of this size an epoch has before a row, counted from its end."""
        return self.length - -(-(self._rows() - row) // (self._size or 1))

    def _row_after(self, row: int) -> int:
        if self._size and self._seeks:
            return min(row + self._size, self._rows())
        return 0

    def _rows(self) -> int:
        return length_of(getattr(self.data, "dataset", ()))

    def _borrowed(self, row: int) -> bool:
        return bool(self._asks(row)) if self._asks else False

    def _held(self) -> StateDict | None:
        """The place of a loader that holds its own, as plain values that later reads leave."""
        return copy.deepcopy(cast(Stateful, self.data).state_dict()) if self._holds else None


def can_seek(data: object) -> TypeGuard[Seekable]:
    """Whether data starts anywhere in an epoch: it has a method `batches`."""
    return callable(getattr(data, "batches", None))


def holds_its_place(data: object) -> TypeGuard[Stateful]:
    """Whether data is to be asked for its place: it has a `state_dict`, and cannot seek."""
    both = (getattr(data, name, None) for name in ("state_dict", "load_state_dict"))
    return all(map(callable, both)) and not can_seek(data)


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


def fingerprint(data: Iterable[Batch]) -> str | None:
    """What tells data from other data: its own `fingerprint`, or a digest of a list of batches."""
    own = getattr(data, "fingerprint", None)
    if own is not None:
        return str(own)
    if not isinstance(data, list | tuple) or not data:
        return None
    return digest([len(data), data[0], data[-1]])


def _tell_epoch(data: Any, epoch: int) -> None:
    """Call `set_epoch` of a loader, its samplers and its data set, each once."""
    sampler, batches = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    owners = (data, sampler, batches, getattr(batches, "sampler", None))
    for owner in {id(o): o for o in (*owners, getattr(data, "dataset", None))}.values():
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)


def _say(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
