"""The stream of batches that a run reads, starting at its cursor."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NotRequired, Protocol, TypedDict

from nexus_core.batches import Batch, Keeper, digest, fingerprint
from nexus_core.cells import dealt
from nexus_core.errors import ConfigError, DataError
from nexus_core.holders import Held, Place
from nexus_core.intervals import Interval, TrainState
from nexus_core.loaders import Source, length_of, say
from nexus_core.processes import Ranks

__all__ = ["Codec", "DataState", "Micro", "RunData", "Stream"]

_END: Batch = object()  # after the last batch


class Codec(Protocol):
    """Turns the ids of a data set into readable text: a tokenizer."""

    @property
    def size(self) -> int: ...  # number of distinct ids
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class RunData:
    """The result of `make_data`; `valid` is keyed by metric prefix: "val"."""

    train: Iterable[Batch]
    valid: Mapping[str, Iterable[Batch]] = field(default_factory=dict)
    codec: Codec | None = None


class Micro(NamedTuple):
    """A micro-batch: the input of one forward and backward pass.

    Args:
        batch: its rows.
        share: for a batch that was cut, the fraction of its rows in this part; for a cell its
            number of rows; else 1.
        borrowed: a row that another rank also trains on, read so that this rank takes part; it has
            no units and no loss.
        cell: index of the cell in the step, over all ranks; None: the run is not in cells.
    """

    batch: Batch
    share: float = 1.0
    borrowed: bool = False
    cell: int | None = None


class DataState(TypedDict):
    """The data state in a snapshot, besides the counters."""

    fingerprint: str | None
    batch_size: int | None  # rows per batch, over all ranks
    row: int  # rows read in this epoch, if the batch size is known
    loader: Held | None  # position of this rank's data
    processes: NotRequired[int]  # number of ranks that read the data
    peers: NotRequired[list[Held | None]]  # position of each rank's data


class Stream:
    """The micro-batches of a run from its cursor on, epoch after epoch.

    It reads one batch ahead only to detect the end of an epoch: after the last batch of data with
    a length, and always for data without one.

    Args:
        data: batches; capabilities are detected by protocol (see `nexus_core.loaders`).
        state: the counters of the run, read once.
        saved: the saved data state of the cursor; None: nothing is known.
        known: whether this is the data that the cursor is in; None: unknown (new process).
        ranks: this process among its peers.
        ends_with_epoch: the last step of an epoch takes only what is left of it.
        cells: number of cells per batch; 0: batches are not divided.

    Raises:
        DataError: there are no batches, or it cannot resume on this number of ranks.
    """

    def __init__(
        self,
        data: Iterable[Batch],
        state: TrainState,
        saved: DataState | None,
        known: bool | None,
        ranks: Ranks,
        ends_with_epoch: bool = False,
        cells: int = 0,
    ) -> None:
        self.data = data
        self._ends_with_epoch = ends_with_epoch
        self.length = length_of(data)
        self._says_length = self.length > 0
        self._ranks, self._print = ranks, fingerprint(data)
        self._source = Source(dealt(data, cells, ranks.size))
        self._taken: list[tuple[Micro, Place]] = []
        self._returned: list[tuple[Micro, Place]] = []
        self._waits = False  # micro-batches are held while others are read
        self._keeper = Keeper()
        self.place = self._beginning(state, saved, known)
        self._batches = self._read()

    def take(self, count: int, horizon: Interval) -> list[Micro]:
        """The next micro-batches; fewer if a horizon in epochs comes first."""
        start, self._taken, self._waits = self.place, [], count > 1
        try:
            while len(self._taken) < count and not self._passed(horizon):
                if self._ends_with_epoch and self._taken and self.place.batch == 0:
                    break
                micro, self.place = self._returned.pop(0) if self._returned else next(self._batches)
                if micro is None:  # the epoch ends after the last one
                    self._taken[-1:] = [(last, self.place) for last, _ in self._taken[-1:]]
                else:
                    self._taken.append((micro, self.place))
        except BaseException:
            self._batches = self._read()  # a generator that raised is exhausted
            self.give_back(start)
            raise
        return [micro for micro, _ in self._taken]

    def close(self) -> None:
        """Stop reading, so that others can read the data at once."""
        self._batches.close()

    def give_back(self, place: Place) -> None:
        """Return the last micro-batches taken, if they cannot be read again."""
        if self._source.is_iterator:
            self.place = place
            if self._source.tells:
                self._batches = self._read()
            else:
                self._returned = [*self._taken, *self._returned]

    def leave_to(self, others: Iterable[object]) -> None:
        """Let others read from the start; the data is reopened at its position afterwards."""
        if any(map(self._source.shares, others)):
            self._batches.close()
            self._source.rewind()
            self._batches = self._read()

    def state(self, place: Place) -> DataState:
        """The data state for a snapshot at a position."""
        return {
            "fingerprint": self._print,
            "batch_size": self._source.size,
            "row": place.row,
            "loader": place.held,
            "processes": self._ranks.size,
        }

    def check(self, length: Interval) -> None:
        """Reject a length that this data cannot measure.

        Raises:
            ConfigError: it is a fraction of an epoch, and the data has no length.
        """
        if length.unit == "epochs" and length.amount % 1 and not self.length:
            raise ConfigError(
                f"'{length}' is a fraction of an epoch, and this data does not say how many "
                "batches an epoch has; give it a __len__, or use steps"
            )

    def _passed(self, horizon: Interval) -> bool:
        if horizon.unit != "epochs":
            return False
        part = self.place.batch / self.length if self.length else 0.0
        return round(self.place.epoch + part, 9) >= horizon.amount

    def _beginning(self, state: TrainState, saved: DataState | None, known: bool | None) -> Place:
        """The cursor's position in this data; other data starts from the beginning."""
        if saved is None or not (state.batch or saved["loader"]):
            return Place(state.epoch, state.batch, held=self._source.begin())
        before, now = saved["fingerprint"], self._print
        compared = before is not None and now is not None
        if not known and (before != now if compared else known is False):
            if state.batch:
                say(
                    f"the run was {state.batch} batches into an epoch of different data; this data "
                    "starts at its first batch"
                )
            return Place(state.epoch, 0, held=self._source.begin())
        held = self._own(saved)
        if self._source.is_iterator and known is not True and not (held and held["now"]):
            say(
                f"the run was {state.batch} batches into an epoch, and this data is an iterator, "
                "read from its current position; use data that can be reread to resume exactly"
            )
        place = Place(state.epoch, state.batch, saved["row"], held)
        size = self._source.size
        if saved["batch_size"] not in (None, size) and hasattr(self.data, "batches_from_row"):
            return place._replace(batch=self._source.number(saved["row"]))
        if self.length and state.epoch_length not in (0, self.length):
            say(
                f"the data had {state.epoch_length} batches per epoch and now has {self.length}; "
                f"the run continues at batch {state.batch} of the epoch"
            )
        return place

    def _own(self, saved: DataState) -> Held | None:
        """The position of this rank's data.

        Raises:
            DataError: a different number of ranks read it, and the loader cannot redistribute.
        """
        places = [saved["loader"], *saved.get("peers", [])]
        told = [place["now"] for place in places if place and place["now"]]
        if (processes := saved.get("processes", self._ranks.size)) == self._ranks.size:
            return places[self._ranks.rank if len(places) > 1 else 0]
        if not told:
            return None
        share = getattr(self.data, "load_state_dicts", None)
        if share is None or len(told) < processes:
            raise DataError(
                f"this data tracks its own position, and that of each of {processes} processes was "
                f"saved; resume with {processes} processes, not {self._ranks.size}, or give it a "
                "method load_state_dicts(states) that takes all of them"
            )
        share([next(iter(now.values())) for now in told])
        return self._source.hold()

    def _read(self) -> Generator[tuple[Micro | None, Place]]:
        """Each micro-batch with the cursor after it; None with the cursor of an end found late."""
        source = self._source
        while True:
            epoch, number, row = self.place.epoch, self.place.batch, self.place.row
            source.tell_epoch(epoch)
            batches = source.open(self.place)
            found, ahead = number, source.read(batches, _END)
            while ahead is not _END:
                sure = self._says_length and self.length > number + 1
                reads_ahead = not (sure or source.is_iterator)
                batch = self._keeper.kept(ahead) if reads_ahead or self._waits else ahead
                borrowed = source.is_borrowed(row)
                number, row = number + 1, source.row_after(row)
                place = Place(epoch, number, row, source.hold())
                if reads_ahead:
                    ahead = self._ahead(batches, number)
                    place = self._seen(place, ahead)
                yield Micro(batch, borrowed=borrowed), place
                if not reads_ahead:
                    ahead = source.read(batches, _END)
            if self.place.epoch == epoch:
                self._ended_early(found, number)
                yield None, Place(epoch + 1, 0, held=source.begin())

    def _seen(self, place: Place, ahead: Batch) -> Place:
        """The position, once what comes next is known."""
        if ahead is _END:
            return Place(place.epoch + 1, 0, held=self._source.begin())
        if place.held and place.held["now"]:
            place.held["next"] = digest(ahead)
        return place

    def _ahead(self, batches: Iterator[Batch], number: int) -> Batch:
        ahead = self._source.read(batches, _END)
        if ahead is not _END and number == self.length:
            say(f"the data has more than the {self.length} batches its length says; all are read")
            self.length = 0
        if ahead is _END and not self.length:
            self.length = number
        return ahead

    def _ended_early(self, found: int, number: int) -> None:
        """The data ended before its length, or cannot be read again for another epoch."""
        iterator = self._source.is_iterator
        if number == found and (iterator or not found):
            raise DataError(
                f"the data ended after {number} batches; pass data that holds batches and can be "
                "reread, or an earlier horizon"
            )
        if number > found and self.length > number:
            say(f"the data has {number} batches, fewer than the {self.length} its length says")
        if number > found:
            self.length = 0 if iterator else number
