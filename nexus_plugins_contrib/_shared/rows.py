"""Rows of batches: one example per row, whole examples packed, or a stream cut into rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_plugins._shared.cache import fingerprint
from nexus_plugins_contrib._shared.examples import IGNORE, Examples, Tokens

__all__ = ["Batching", "Cut", "Layout", "One", "Row", "RowBatch", "Rows", "Together", "batch_of"]

Ids = NDArray[np.int64]
Batching: TypeAlias = Literal["pad", "pack", "cut"]
Row: TypeAlias = list[Tokens]
"""The documents of a row, or parts of them, in order."""
RowBatch: TypeAlias = dict[str, Tensor]


class One:
    """One row per example, truncated at `length`."""

    def __init__(self, examples: Examples, length: int) -> None:
        self.examples, self.length = examples, length

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lost(self) -> int:
        """The number of tokens that are in no row."""
        return int((self.examples.lengths - self.length).clip(min=0).sum())

    def rows(self, number: int) -> tuple[Row, ...]:
        """The documents of a row, or of both rows of a preference."""
        return tuple([tokens.cut_off(self.length)] for tokens in self.examples[number])


class Together(One):
    """Whole examples packed into rows of `length` by best fit decreasing.

    Longer examples are truncated. Rows are in the order of their first example.
    """

    def __init__(self, examples: Examples, length: int) -> None:
        super().__init__(examples, length)
        self._rows = _best_fit(np.minimum(examples.lengths, length), length)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, number: int) -> tuple[Row, ...]:
        members = self._rows[number]
        return ([self.examples[member][0].cut_off(self.length) for member in members],)


class Cut(One):
    """All examples concatenated and cut into rows of `length`.

    Args:
        complete: keep the last row even if it is not full.
    """

    def __init__(self, examples: Examples, length: int, complete: bool) -> None:
        super().__init__(examples, length)
        self._complete = complete
        self._ends = examples.ends[:, -1]

    def __len__(self) -> int:
        full, rest = divmod(int(self._ends[-1]), self.length)
        return full + (1 if rest and self._complete else 0)

    @property
    def lost(self) -> int:
        return 0 if self._complete else int(self._ends[-1]) % self.length

    def rows(self, number: int) -> tuple[Row, ...]:
        first = number * self.length
        last = min(first + self.length, int(self._ends[-1]))
        low = int(self._ends.searchsorted(first, "right"))
        high = int(self._ends.searchsorted(last, "left"))
        edges = [first, *self._ends[low:high].tolist(), last]
        parts = [self.examples.cut(*pair) for pair in pairwise(edges)]
        if last < int(self._ends[high]):  # the document continues in the next row
            whole = self.examples.cut(edges[-2], last + 1)
            parts[-1] = whole.part(0, last - edges[-2])
        return (parts,)


Layout: TypeAlias = One


class Rows:
    """A map-style data set of the rows of several sources, concatenated.

    Args:
        layouts: how each source becomes rows.
        batching: "pad" pads rows to the longest of a batch, others to their length.
        pad: the padding id.
        limit: maximum number of rows, evenly spread.
        token_bytes: `(V,)`, bytes of text of each id, to count those of labels; None: not counted.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        batching: Batching,
        pad: int,
        limit: int | None = None,
        token_bytes: Ids | None = None,
    ) -> None:
        self.layouts = tuple(layouts)
        self._width = None if batching == "pad" else layouts[0].length
        self._pad, self._token_bytes = pad, token_bytes
        self.sizes = tuple(map(len, layouts))
        self._ends = np.cumsum(self.sizes)
        self.total = int(self._ends[-1])
        self._count = min(self.total, limit or self.total)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> RowBatch:
        return self.__getitems__([number])

    def __getitems__(self, numbers: Sequence[int]) -> RowBatch:
        """The batch of some rows; with `label_bytes` `(B,)` int64, if counted."""
        found = [self.row(number) for number in numbers]
        batch = batch_of(found, self._width, self._pad)
        if self._token_bytes is not None:
            labels = batch["labels"].numpy()
            real = labels != IGNORE
            counts = np.where(real, self._token_bytes[np.where(real, labels, 0)], 0)
            batch["label_bytes"] = torch.from_numpy(counts.sum(axis=1))
        return batch

    def row(self, number: int) -> tuple[Row, ...]:
        """The documents of a row, or of both rows of a preference."""
        place = number * self.total // self._count
        source = int(self._ends.searchsorted(place, "right"))
        return self.layouts[source].rows(place - int(self._ends[source]) + self.sizes[source])

    @property
    def lost(self) -> int:
        """The number of tokens that are in no row."""
        return sum(layout.lost for layout in self.layouts)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content of all rows, wherever it is stored."""
        cut = [
            (type(layout).__name__, layout.length, layout.examples.fingerprint)
            for layout in self.layouts
        ]
        return fingerprint(cut, self.sizes, self._count, self._width, self._pad)[:16]


def batch_of(rows: Sequence[tuple[Row, ...]], width: int | None, pad: int) -> RowBatch:
    """A batch of rows.

    It has `input_ids` and `labels` `(B, T)` int64; `labels[t]` is the id that follows position t,
    or -100 if that is not learned, and at the end of a document. Padded rows come with an
    `attention_mask` `(B, T)` int64; packed ones with `position_ids` `(B, T)` int64, from 0 in each
    document, and `segment_ids` `(B, T)` int32, the index of the document in its row; padding is a
    separate document. Preferences have all of these twice, as `chosen_...` and `rejected_...`.

    Args:
        rows: the documents of each row; two rows per preference.
        width: T; None: the longest of the rows, which have one document each.
        pad: the padding id.
    """
    if len(rows[0]) == 1:
        return _side([row[0] for row in rows], width, pad)
    sides = zip(("chosen", "rejected"), zip(*rows, strict=True), strict=True)
    return {
        f"{side}_{name}": tensor
        for side, members in sides
        for name, tensor in _side(list(members), width, pad).items()
    }


def _side(rows: Sequence[Row], width: int | None, pad: int) -> RowBatch:
    longest = max(sum(len(part.ids) for part in row) for row in rows)
    shape = len(rows), longest if width is None else width
    ids, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORE, np.int64)
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        end = 0
        for document, part in enumerate(row):
            begin, end = end, end + len(part.ids)
            ids[number, begin:end] = part.ids
            labels[number, begin:end] = part.labels
            positions[number, begin:end] = np.arange(end - begin)
            segments[number, begin:end] = document
        mask[number, :end] = 1
        positions[number, end:] = np.arange(shape[1] - end)
        segments[number, end:] = len(row)
    arrays: dict[str, NDArray[Any]] = {"input_ids": ids, "labels": labels}
    if width is None:
        arrays["attention_mask"] = mask
    else:
        arrays |= {"position_ids": positions, "segment_ids": segments}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _best_fit(lengths: Ids, room: int) -> list[list[int]]:
    """Which examples share a row: each, longest first, goes where it leaves the least room.

    Source: best fit decreasing, Johnson 1974; rows are found by the bits of a number, one for each
    amount of room that some row has left.
    """
    left: dict[int, list[list[int]]] = {}
    rooms = 0  # bit n: some row has n tokens left
    rows: list[list[int]] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[number])
        fitting = rooms >> need
        have = need + (fitting & -fitting).bit_length() - 1 if fitting else room
        if fitting:
            row = left[have].pop()
            if not left[have]:
                rooms ^= 1 << have
        else:
            row = []
            rows.append(row)
        row.append(number)
        left.setdefault(have - need, []).append(row)
        rooms |= 1 << (have - need)
    return sorted(sorted(row) for row in rows)
