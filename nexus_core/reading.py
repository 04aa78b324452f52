"""Which data a run reads, and where in it the run is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nexus_core.data import Batch, DataState, Place, Stream, is_same
from nexus_core.intervals import Interval, TrainState

__all__ = ["Reading"]


class Reading:
    """The data of a run, its stream, and the cursor as of the last step.

    It outlives a loop, so that the next one continues; a restored run gets another.

    Args:
        saved: what a snapshot says of the data.
    """

    def __init__(self, saved: DataState | None = None) -> None:
        self._saved = saved
        self._data: Iterable[Batch] | None = None
        self._stream: Stream | None = None
        self._place: Place | None = None

    def open(
        self, data: Iterable[Batch], state: TrainState, lengths: Iterable[Interval | None]
    ) -> Stream:
        """The stream of this data from the cursor on; the open one of an iterator continues.

        Args:
            data: to read.
            state: the counters of the run, which get those of the cursor.
            lengths: the horizon and other periods of the run.

        Raises:
            ConfigError: a length cannot be told in this data.
        """
        last = self._stream
        if last is not None and data is last.data and isinstance(data, Iterator):
            return last
        stream = Stream(data, state, self.state(), is_same(data, self._data))
        for length in filter(None, lengths):
            stream.check(length)
        self._data, self._stream = data, stream
        self.commit(stream, state)
        return stream

    def commit(self, stream: Stream, state: TrainState) -> None:
        """Move the cursor to where its stream is."""
        self._place = place = stream.place
        state.epoch, state.batch, state.epoch_length = place.epoch, place.batch, stream.length

    def state(self) -> DataState | None:
        """What a snapshot keeps of the data."""
        if self._stream is None or self._place is None:
            return self._saved
        return self._stream.state(self._place)
