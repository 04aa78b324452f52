"""Rows from streams: read once, mixed and packed on the fly, resumable at any position."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy as np

from nexus_core import DataError
from nexus_core.bases.loader import permute
from nexus_core.processes import Ranks
from nexus_plugins_contrib._shared.examples import Encoder, Example, Fault, examples_of, is_held_out
from nexus_plugins_contrib._shared.mixture import Mixture
from nexus_plugins_contrib._shared.records import Place, Record, Records
from nexus_plugins_contrib._shared.rows import Batching, Row, RowBatch, batch_of

__all__ = ["StreamLoader", "StreamRows", "Streamed"]


class StreamPlace(TypedDict):
    """The position of a stream."""

    passes: int  # completed passes over its source
    block: int  # index of the shuffle block in this pass
    start: dict[str, Any]  # position of the source at the start of that block
    record: int  # index in the shuffled block
    example: int  # index in the record
    offset: int  # tokens of the example in earlier rows


Value = TypeVar("Value")
_Placed: TypeAlias = Iterator[tuple[Value, StreamPlace]]
"""Values, each with the position after it."""


@dataclass(frozen=True)
class Streamed:
    """How a source is read and its examples become rows.

    Args:
        name: its name in messages.
        open: opens it at its start.
        encoder: makes examples from its records.
        batching, length: how these become rows, as in `Rows`.
        skips: skip unusable records.
        share: share of the records that are held out, and skipped here.
        shuffle: number of records shuffled together; 1 keeps their order.
        seed: seed of that order.
    """

    name: str
    open: Callable[[], Records]
    encoder: Encoder
    batching: Batching
    length: int
    skips: bool
    share: float
    shuffle: int
    seed: int


class StreamRows:
    """Rows of one source, pass after pass, from a position that can be saved.

    Records are shuffled within blocks, so a position is a block and an index in it; resuming
    rereads only that block.

    Attributes:
        place: position after the last row read.
    """

    def __init__(self, source: Streamed) -> None:
        self._source = source
        self._records = source.open()
        self._beginning = self._records.state_dict()
        self.place = self._pass(0)
        self._rows = self._read()

    def go(self, place: StreamPlace) -> None:
        """Resume at a position."""
        self.place = copy.deepcopy(place)
        self._rows = self._read()

    def next(self) -> tuple[Row, ...]:
        """The next row.

        Raises:
            DataError: a record cannot be used, or none of a whole pass can.
        """
        row, self.place = next(self._rows)
        return row

    def _pass(self, number: int) -> StreamPlace:
        """The position at the start of a pass."""
        return {
            "passes": number,
            "block": 0,
            "start": self._beginning,
            "record": 0,
            "example": 0,
            "offset": 0,
        }

    def _read(self) -> _Placed[tuple[Row, ...]]:
        make = {"pad": self._single, "pack": self._together, "cut": self._cut}
        return make[self._source.batching](self.place)

    def _single(self, place: StreamPlace) -> _Placed[tuple[Row, ...]]:
        for example, _, after in self._examples(place):
            yield tuple([tokens.cut_off(self._source.length)] for tokens in example), after

    def _together(self, place: StreamPlace) -> _Placed[tuple[Row, ...]]:
        """Rows of whole examples in order, as many as fit; a row ends with its pass."""
        length, row, room = self._source.length, Row(), self._source.length
        for (whole,), before, after in self._examples(place):
            tokens = whole.cut_off(length)
            if row and len(tokens.ids) > room:
                yield (row,), before
                row, room = [], length
            row, room = [*row, tokens], room - len(tokens.ids)
            if not room or after["passes"] > before["passes"]:
                yield (row,), after
                row, room = [], length

    def _cut(self, place: StreamPlace) -> _Placed[tuple[Row, ...]]:
        """Rows of tokens in order; the rest of a pass starts the next pass's first row."""
        row, room, offset = Row(), self._source.length, place["offset"]
        for (tokens,), before, after in self._examples(place):
            while offset < len(tokens.ids):
                part = tokens.part(offset, room)
                row, room, offset = [*row, part], room - len(part.ids), offset + len(part.ids)
                if not room:
                    within: StreamPlace = {**before, "offset": offset}
                    yield (row,), within if offset < len(tokens.ids) else after
                    row, room = [], self._source.length
            offset = 0

    def _examples(self, place: StreamPlace) -> Iterator[tuple[Example, StreamPlace, StreamPlace]]:
        """Each example, its position and that of the next one, pass after pass."""
        found = self._found(place)
        example, before = next(found)
        for following, after in found:
            yield example, before, after
            example, before = following, after

    def _found(self, place: StreamPlace) -> _Placed[Example]:
        """Each usable example, with its position."""
        usable = 0
        for block, records, following in self._blocks(place):
            done = block["record"]
            chosen = self._shuffled(records, block)[done:]
            for number, (where, made) in enumerate(examples_of(iter(chosen), self._encoder), done):
                examples = self._usable(where, made)
                usable += len(examples)
                first = block["example"] if number == done else 0
                for one in range(first, len(examples)):
                    here: StreamPlace = {**block, "record": number, "example": one, "offset": 0}
                    yield examples[one], here
            if following["passes"] > block["passes"] and not usable:
                raise DataError(f"{self._source.name} has no usable record")

    def _blocks(
        self, place: StreamPlace
    ) -> Iterator[tuple[StreamPlace, list[tuple[Place, Record]], StreamPlace]]:
        """The records of each block, the position in it to start from, and the one after it."""
        while True:
            self._records.load_state_dict(copy.deepcopy(place["start"]))
            reader = iter(self._records)
            ahead = next(reader, None)
            if ahead is None:
                raise DataError(f"{self._source.name} has no records")
            while ahead is not None:
                records = [ahead, *islice(reader, self._source.shuffle - 1)]
                end, ahead = self._records.state_dict(), next(reader, None)
                following = self._pass(place["passes"] + (ahead is None))
                if ahead is not None:
                    following |= {"block": place["block"] + 1, "start": end}
                yield place, records, following
                place = following

    def _shuffled(
        self, records: list[tuple[Place, Record]], place: StreamPlace
    ) -> list[tuple[Place, Record]]:
        if self._source.shuffle == 1:
            return records
        drawn = place["passes"] << 32 | place["block"]
        order = permute(np.arange(len(records)), len(records), self._source.seed, drawn)
        return [records[number] for number in order.tolist()]

    @property
    def _encoder(self) -> Encoder:
        return self._source.encoder

    def _usable(self, place: Place, made: list[Example] | Fault) -> list[Example]:
        if isinstance(made, Fault):
            if not self._source.skips:
                raise DataError(f"{place}: {made.what}")
            return []
        return [] if made and is_held_out(made[0], self._source.share) else made


class StreamLoader:
    """Batches of rows of one stream or a mixture of several, with a saved position.

    An epoch ends when every source has been read completely. Each rank reads all rows, in one
    global order, and takes its slice of each batch; so the position is the same on all ranks, and
    valid for any number of them.

    Args:
        sources: the streams.
        mixture: the source of each row; None: there is only one.
        batch_size: rows per batch, over all ranks.
        pad: the id that fills rows.
        ranks: this process's rank.
        fingerprint: hash of the data and its order.
    """

    def __init__(
        self,
        sources: Sequence[Streamed],
        mixture: Mixture | None,
        batch_size: int,
        pad: int,
        ranks: Ranks,
        fingerprint: str,
    ) -> None:
        self.fingerprint = fingerprint
        self._rows = [StreamRows(source) for source in sources]
        self._mixture = mixture
        self._size, self._pad, self._ranks = batch_size, pad, ranks
        first = sources[0]
        self._width = None if first.batching == "pad" else first.length
        self._row = 0
        self._begun = self._passes()

    def __iter__(self) -> Iterator[RowBatch]:
        while (rows := self._batch()) and len(rows) >= self._ranks.size:
            places = np.array_split(np.arange(len(rows)), self._ranks.size)[self._ranks.rank]
            yield batch_of([rows[place] for place in places.tolist()], self._width, self._pad)
        self._begun = self._passes()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch read; the same on every rank."""
        places = [dict(rows.place) for rows in self._rows]
        return {"row": self._row, "begun": list(self._begun), "sources": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a position."""
        self._row, self._begun = state["row"], list(state["begun"])
        for rows, place in zip(self._rows, state["sources"], strict=True):
            rows.go(place)

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume at the position saved by another number of ranks; all of them have the same."""
        self.load_state_dict(states[0])

    def _batch(self) -> list[tuple[Row, ...]]:
        """The rows of the next batch, over all ranks; fewer at the end of an epoch."""
        rows: list[tuple[Row, ...]] = []
        while len(rows) < self._size and not self._is_over():
            source = 0
            if self._mixture is not None:
                source = int(self._mixture.sources(self._row, self._row + 1)[0])
            rows.append(self._rows[source].next())
            self._row += 1
        return rows

    def _is_over(self) -> bool:
        now = self._passes()
        return all(after > before for after, before in zip(now, self._begun, strict=True))

    def _passes(self) -> list[int]:
        return [rows.place["passes"] for rows in self._rows]
