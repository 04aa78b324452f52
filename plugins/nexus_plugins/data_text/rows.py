"""Rows cut out of token streams: each row is a pure function of its index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_core.errors import DataError
from nexus_plugins._shared.cache import fingerprint
from nexus_plugins.data_text.stream import Stream
from nexus_plugins.data_text.tokenizer import Tokenizer

__all__ = ["Layout", "PackedRows", "PaddedRows", "RowBatch", "Rows", "as_it_is"]

Ids = NDArray[np.int64]
RowBatch: TypeAlias = dict[str, Tensor]
"""A batch by name: see `PackedRows` and `PaddedRows`."""

_IGNORE = -100  # the label that torch's losses ignore


class Layout:
    """Maps each sample of an epoch to a source and a row in it.

    A source with more samples than rows repeats its rows in turn; one with fewer contributes evenly
    spaced rows. The layout takes no memory and does not depend on the epoch.

    Args:
        rows: number of rows of each source.
        samples: number of samples per epoch of each source.
    """

    def __init__(self, rows: Sequence[int], samples: Sequence[int]) -> None:
        self._rows = np.asarray(rows, dtype=np.int64)
        self._samples = np.asarray(samples, dtype=np.int64)
        self._ends = self._samples.cumsum()

    @classmethod
    def limited(cls, rows: Sequence[int], limit: int | None) -> Layout:
        """Every row once, or about `limit` rows, in proportion to each source's size."""
        total = sum(rows)
        if limit is None or limit >= total:
            return cls(rows, rows)
        return cls(rows, [-(-count * limit // total) for count in rows])

    @classmethod
    def mixture(cls, rows: Sequence[int], weights: Sequence[float]) -> Layout:
        """The shortest epoch with these shares that covers every row at least once."""
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        length = max(count / share for count, share in zip(rows, shares, strict=True))
        samples = np.maximum(np.rint(length * shares).astype(np.int64), rows)
        return cls(rows, samples.tolist())

    @property
    def key(self) -> tuple[list[int], list[int]]:
        """The identity of a layout: the rows and samples of each source."""
        return self._rows.tolist(), self._samples.tolist()

    def __len__(self) -> int:
        return int(self._samples.sum())

    def locate(self, samples: Ids) -> tuple[Ids, Ids]:
        """The source of each sample, and its row there."""
        source = self._ends.searchsorted(samples, "right")
        rows, given = self._rows[source], self._samples[source]
        within = samples - (self._ends[source] - given)
        row = np.where(given < rows, within * rows // given, within % rows)
        return source.astype(np.int64), row


class Rows(ABC):
    """A map-style dataset whose samples are rows of tokens.

    Args:
        streams: the sources.
        tokenizer: provides the pad id and the bytes of text per label.
        length: maximum tokens in a row.
        complete: keep the last row of a source even if it is not full.
        weights: shares of the sources in an epoch; None: every row once.
        limit: use about this many rows instead of all.
    """

    LOST: ClassVar[str]
    """Why tokens are skipped: the text after their number."""

    def __init__(
        self,
        streams: Sequence[Stream],
        tokenizer: Tokenizer,
        length: int,
        *,
        complete: bool = True,
        weights: Sequence[float] | None = None,
        limit: int | None = None,
    ) -> None:
        self.streams = tuple(streams)
        self.length = length
        self._complete = complete
        self._pad = tokenizer.pad
        self._size = tokenizer.size
        self._tokenizer = tokenizer.hash
        self._table = _label_table(tokenizer)
        self._counted = self._table is not None or all(
            stream.read_bytes(0, 0) is not None for stream in self.streams
        )
        self._ends = np.array([len(stream) for stream in self.streams])
        self.counts = [self.rows_of(stream) for stream in self.streams]
        if weights is not None and len(weights) > 1:
            self.layout = Layout.mixture(self.counts, weights)
        else:
            self.layout = Layout.limited(self.counts, limit)

    @abstractmethod
    def rows_of(self, stream: Stream) -> int:
        """The number of rows in a stream."""

    @abstractmethod
    def spans(self, sources: Ids, rows: Ids) -> list[tuple[int, int]]:
        """The token positions of each row: the first, and one past the last."""

    @abstractmethod
    def __getitems__(self, samples: Sequence[int]) -> RowBatch:
        """The batch of some samples."""

    @property
    @abstractmethod
    def lost(self) -> int:
        """The number of tokens that are in no row."""

    def __len__(self) -> int:
        return len(self.layout)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content of all rows: text, order, tokenizer and row boundaries.

        Renaming or moving files does not change it; other content does. Only samples of each file
        are hashed, so large files take no longer.
        """
        cut = (type(self).__name__, self.length, self._complete, self._pad, self._tokenizer)
        return fingerprint(*cut, self.layout.key, [one.fingerprint() for one in self.streams])[:16]

    def __getitem__(self, sample: int) -> RowBatch:
        return {name: rows[0] for name, rows in self.__getitems__([sample]).items()}

    def tokens(self, samples: Sequence[int]) -> list[Ids]:
        """The number of tokens in each sample, without padding."""
        shown = []
        for stream, first, last in self.locate(samples):
            shown.append(np.empty(last - first, np.int64))
            stream.read(first, last, shown[-1])
        return shown

    def locate(self, samples: Sequence[int]) -> list[tuple[Stream, int, int]]:
        """The stream of each sample, and the positions of its tokens."""
        sources, rows = self.layout.locate(np.asarray(samples, dtype=np.int64))
        pairs = zip(sources.tolist(), self.spans(sources, rows), strict=True)
        return [(self.streams[source], *span) for source, span in pairs]

    def _open(self, samples: Sequence[int]) -> list[tuple[Stream, int, int]]:
        """`locate`, after checking that the files have not changed."""
        spans = self.locate(samples)
        for stream in dict.fromkeys(stream for stream, _, _ in spans):
            stream.check()
        return spans

    def _check_ids(self, tokens: NDArray[Any]) -> None:
        highest = int(tokens.max(initial=0))
        if highest >= self._size:
            raise DataError(
                f"the data has id {highest}, but the vocabulary has {self._size} ids; check it "
                "with: nexus-data inspect"
            )

    def _batch(
        self, arrays: dict[str, NDArray[Any]], spans: Sequence[tuple[Stream, int, int]]
    ) -> RowBatch:
        counted = self._label_bytes(arrays["labels"], spans)
        if counted is not None:
            arrays["label_bytes"] = counted
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _label_bytes(self, labels: Ids, spans: Sequence[tuple[Stream, int, int]]) -> Ids | None:
        """Bytes of text of each row's labels, `(B,)`; None: not all are known."""
        if not self._counted:
            return None
        known = np.zeros(len(spans), np.int64)
        if self._table is not None:
            known = self._table.take(labels).sum(axis=1, dtype=np.int64)
        for number, (stream, first, last) in enumerate(spans):
            counts = stream.read_bytes(first + 1, min(last + 1, len(stream)))
            if counts is not None:
                known[number] = counts[labels[number, : len(counts)] != _IGNORE].sum()
        return known


class PackedRows(Rows):
    """Concatenated documents, cut into rows of equal length: no padding, nothing dropped.

    Row i contains tokens `i * length` to `(i + 1) * length - 1` of its stream; the label of a row's
    last token is the first token of the next row, if that belongs to the same document.

    A batch has `input_ids` and `labels` `(B, T)` int64 (`labels[t]` follows position t; -100 at
    the end of a document), `segment_ids` `(B, T)` int32 (0 at the start of a row, one more at each
    start of a document) and `label_bytes` `(B,)` int64 (bytes of text that the labels stand for).
    """

    LOST = "are not trained on: they are left over after the last full row"

    def rows_of(self, stream: Stream) -> int:
        full, rest = divmod(len(stream), self.length)
        return full + (1 if rest and self._complete else 0)

    def spans(self, sources: Ids, rows: Ids) -> list[tuple[int, int]]:
        firsts = rows * self.length
        lasts = np.minimum(firsts + self.length, self._ends[sources])
        return list(zip(firsts.tolist(), lasts.tolist(), strict=True))

    @property
    def lost(self) -> int:
        if self._complete:
            return 0
        return sum(len(stream) % self.length for stream in self.streams)

    def __getitems__(self, samples: Sequence[int]) -> RowBatch:
        spans = self._open(samples)
        tokens = self._tokens(spans)
        self._check_ids(tokens)
        inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
        for number, (_, first, last) in enumerate(spans):
            if last - first < self.length:
                inputs[number, last - first :] = self._pad
        starts = self._starts(spans)
        labels.reshape(-1)[starts - 1] = _IGNORE
        segments = self._segments(len(spans), starts)
        arrays: dict[str, NDArray[Any]] = {"input_ids": inputs, "labels": labels}
        arrays["segment_ids"] = segments
        return self._batch(arrays, spans)

    def _tokens(self, spans: Sequence[tuple[Stream, int, int]]) -> NDArray[Any]:
        """The tokens of each row and the next one, `(B, T + 1)`; -100 after the end."""
        first_stream = spans[0][0]
        if all(stream is first_stream for stream, _, _ in spans):
            firsts = np.array([first for _, first, _ in spans])
            block = first_stream.block(firsts, self.length + 1)
            if block is not None:
                return block
        tokens = np.full((len(spans), self.length + 1), _IGNORE, np.int64)
        for number, (stream, first, last) in enumerate(spans):
            seen = min(last + 1, len(stream))
            stream.read(first, seen, tokens[number, : seen - first])
        return tokens

    def _starts(self, spans: Sequence[tuple[Stream, int, int]]) -> Ids:
        """The positions in `(B * T + 1,)` at which documents start, except at row starts."""
        found = []
        for stream in dict.fromkeys(stream for stream, _, _ in spans):
            mine = [number for number, span in enumerate(spans) if span[0] is stream]
            firsts = np.array([spans[number][1] for number in mine])
            starts, counts = stream.starts(firsts + 1, firsts + self.length + 1)
            found.append(starts + np.repeat(np.array(mine) * self.length - firsts, counts))
        return np.concatenate(found)

    def _segments(self, rows: int, starts: Ids) -> NDArray[np.int32]:
        marks = np.zeros(rows * self.length + 1, np.int32)
        marks[starts] = 1
        table = marks[:-1].reshape(rows, self.length)
        table[:, 0] = 0  # a start after the row only ends its last label
        return table.cumsum(axis=1, dtype=np.int32)


class PaddedRows(Rows):
    """One document per row: truncated at `length`, padded to the longest of the batch.

    A batch has `input_ids`, `labels` (-100 on padding) and `attention_mask` (1 on tokens, 0 on
    padding), all `(B, T)` int64, and `label_bytes` `(B,)` int64.
    """

    LOST = "are truncated from long documents (data_text.max_length)"

    def rows_of(self, stream: Stream) -> int:
        return stream.documents

    def spans(self, sources: Ids, rows: Ids) -> list[tuple[int, int]]:
        whole = [
            self.streams[source].span(row)
            for source, row in zip(sources.tolist(), rows.tolist(), strict=True)
        ]
        return [(first, min(last, first + self.length)) for first, last in whole]

    @property
    def lost(self) -> int:
        """The number of tokens truncated from long documents."""
        return sum(
            int((lengths - self.length).clip(min=0).sum())
            for stream in self.streams
            for lengths in stream.document_lengths()
        )

    def __getitems__(self, samples: Sequence[int]) -> RowBatch:
        spans = self._open(samples)
        width = max(1, *(last - first for _, first, last in spans))
        inputs = np.full((len(spans), width), self._pad, np.int64)
        labels = np.full((len(spans), width), _IGNORE, np.int64)
        mask = np.zeros((len(spans), width), np.int64)
        for number, (stream, first, last) in enumerate(spans):
            count = last - first
            stream.read(first, last, inputs[number, :count])
            labels[number, : max(0, count - 1)] = inputs[number, 1:count]
            mask[number, :count] = 1
        self._check_ids(inputs)
        arrays = {"input_ids": inputs, "labels": labels, "attention_mask": mask}
        return self._batch(arrays, spans)


def _label_table(tokenizer: Tokenizer) -> NDArray[Any] | None:
    """Bytes of text by label; -100, read from the end of the table, stands for none."""
    lengths = tokenizer.token_bytes
    if lengths is None:
        return None
    table = np.concatenate([lengths, np.zeros(-_IGNORE, np.int64)])
    return table.astype(np.min_scalar_type(table.max()))


def as_it_is(batch: Any) -> Any:
    """The collate function for `ResumableLoader`: `Rows` already makes whole batches."""
    return batch
