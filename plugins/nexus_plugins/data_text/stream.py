"""Token streams over documents in memory, in a file, or in many files."""

from __future__ import annotations

import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nexus_core.errors import DataError
from nexus_plugins._shared.cache import fingerprint, sample
from nexus_plugins._shared.paths import reason

__all__ = ["Chain", "MappedFile", "Named", "Origin", "Place", "Stream", "TokenStream", "chained"]

Ids = NDArray[np.int64]
Raw = NDArray[Any]
_PORTION = 1 << 20  # documents


@dataclass(frozen=True)
class Place:
    """The origin of a token.

    Args:
        file: the file, or the name of a corpus.
        document: its index in the file, from 0.
        offset: its offset in the document, in tokens.
    """

    file: str
    document: int
    offset: int


class Origin(Protocol):
    """Maps the documents of a stream to where they come from."""

    def name(self, document: int, source: int) -> tuple[str, int]:
        """The file of a document and its index there, from 0.

        Args:
            document: its index in the stream.
            source: where it starts in the stream's data.
        """


@dataclass(frozen=True)
class Named:
    """Documents in the order of their files.

    Args:
        files: `(name, first document)` of each.
    """

    files: tuple[tuple[str, int], ...]

    def name(self, document: int, source: int) -> tuple[str, int]:
        number = bisect_right(self.files, document, key=lambda pair: pair[1]) - 1
        name, first = self.files[number]
        return name, document - first


class Stream(Protocol):
    """A sequence of tokens made of documents; positions count tokens from 0."""

    def __len__(self) -> int:
        """The number of tokens."""

    @property
    def documents(self) -> int:
        """The number of documents."""

    def read(self, first: int, last: int, out: Ids) -> None:
        """Write the tokens of positions `first` to `last - 1` into `out`."""

    def block(self, firsts: Ids, count: int) -> Raw | None:
        """`(B, count)`: `count` tokens from each position, if one gather can read them."""

    def read_bytes(self, first: int, last: int) -> Ids | None:
        """Bytes of text that each token stands for; None: see the tokenizer's table."""

    def starts(self, firsts: Ids, lasts: Ids) -> tuple[Ids, Ids]:
        """The positions at which a document starts, from `first` to `last - 1` of each pair.

        Returns:
            The starts of all pairs, concatenated, and how many each pair has.
        """

    def place(self, position: int) -> Place:
        """The document that a token belongs to."""

    def span(self, document: int) -> tuple[int, int]:
        """The positions of a document: its first token, and one past its last."""

    def document_lengths(self) -> Iterator[Ids]:
        """The length of each document in tokens, in portions that fit in memory."""

    def fingerprint(self) -> str:
        """A hash of the stream's content, wherever it is stored; large streams are sampled."""

    def check(self) -> None:
        """Check that no file has changed; call it before reading each batch.

        Raises:
            DataError: one has changed; reading a truncated mapping would kill the process.
        """


class MappedFile:
    """A memory-mapped file of fixed-size numbers, watched for changes.

    Only the path is sent to worker processes, which map it themselves.

    Args:
        path: the file.
        dtype: dtype of `array`.
        offset: bytes to skip at the start.
        count: how many numbers to map; None: all up to the end.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(
        self, path: Path, dtype: str = "u1", offset: int = 0, count: int | None = None
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype if ">" in dtype else np.dtype(dtype).newbyteorder("<"))
        self.offset = offset
        self._count = count
        self._signature = self._open()

    def _open(self) -> tuple[int, int]:
        try:
            with self.path.open("rb") as file:
                self._descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._descriptor)
                signature = self._stat()
                there = max(0, signature[0] - self.offset) // self.dtype.itemsize
                count = there if self._count is None else min(there, self._count)
                self.array: Raw = (
                    np.memmap(file, self.dtype, "r", self.offset, (count,)).view(np.ndarray)
                    if count
                    else np.zeros(0, self.dtype)
                )
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {reason(error)}") from error
        return signature

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Check that the file is unchanged.

        Raises:
            DataError: it has changed.
        """
        if self._stat() != self._signature:
            raise DataError(
                f"{self.path} changed while it was in use; do not write to files that a run "
                "reads (write a new file and rename it), and start the run again"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_descriptor"], state["array"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class TokenStream:
    """Documents in one array of ids or of bytes.

    Args:
        data: the numbers, in memory or mapped: ids, or bytes of text used as ids.
        starts: `(documents + 1,)`, where each document starts in the stream, and its length.
        sources: `(documents,)`, where each starts in `data`; None: at the same position.
        eos: added after each document, if `data` does not contain it; None: `data` does.
        lengths: bytes of text of each entry of `data`, if there is no table.
        origin: gives the file of each document and its index there.
        checksum: checksum of all of `data`, if it has been read.
    """

    def __init__(
        self,
        data: Raw | MappedFile,
        starts: Ids | MappedFile,
        *,
        sources: Ids | MappedFile | None = None,
        eos: int | None = None,
        lengths: Ids | MappedFile | None = None,
        origin: Origin,
        checksum: str = "",
    ) -> None:
        self._checksum = checksum
        self._data = data
        self._starts = starts
        self._sources = sources
        self._eos = eos
        self._lengths = lengths
        self._origin = origin
        edges = _array(starts)
        self._length = int(edges[-1])
        self._documents = len(edges) - 1

    def __len__(self) -> int:
        return self._length

    @property
    def documents(self) -> int:
        return self._documents

    def read(self, first: int, last: int, out: Ids) -> None:
        data = _array(self._data)
        if self._sources is None:
            out[:] = data[first:last]
        elif last > first:
            self._gather(data, first, last, out)

    def block(self, firsts: Ids, count: int) -> Raw | None:
        if self._sources is not None or int(firsts.max()) + count > self._length:
            return None
        data = _array(self._data)
        windows: Raw = np.ndarray(
            (self._length - count + 1, count), data.dtype, data, strides=2 * data.strides
        )
        stretches: Raw = windows[firsts]
        return stretches

    def _gather(self, data: Raw, first: int, last: int, out: Ids) -> None:
        indices, begins = self._indices(first, last)
        if self._eos is None:
            out[:] = data[indices]
            return
        out[:] = data[np.minimum(indices, len(data) - 1)]  # the last eos is after the data
        ends = begins[1:] - 1
        out[ends[ends < last] - first] = self._eos

    def _indices(self, first: int, last: int) -> tuple[Ids, Ids]:
        """The indices of positions in `data`, and the starts of their and the next documents."""
        starts, sources = _array(self._starts), self.sources
        low = int(starts.searchsorted(first, "right")) - 1
        high = int(starts.searchsorted(last, "left"))
        begins = starts[low : high + 1]
        lengths = np.diff(begins.clip(first, last))
        shift = np.repeat(sources[low:high] - begins[:-1], lengths)
        return np.arange(first, last) + shift, begins

    def read_bytes(self, first: int, last: int) -> Ids | None:
        if self._lengths is None:
            return None
        lengths = _array(self._lengths)
        if self._sources is None:
            return lengths[first:last].astype(np.int64)
        return lengths[self._indices(first, last)[0]].astype(np.int64)

    def starts(self, firsts: Ids, lasts: Ids) -> tuple[Ids, Ids]:
        starts = _array(self._starts)[:-1]
        lows, highs = starts.searchsorted(np.stack([firsts, lasts]))
        counts = highs - lows
        ends = counts.cumsum()
        numbers = np.arange(ends[-1]) + np.repeat(highs - ends, counts)
        return starts[numbers], counts

    def place(self, position: int) -> Place:
        starts = _array(self._starts)
        document = int(starts.searchsorted(position, "right")) - 1
        offset = position - int(starts[document])
        source = int(starts[document] if self._sources is None else self.sources[document])
        return Place(*self._origin.name(document, source), offset)

    @property
    def sources(self) -> Ids:
        """Where each document starts in the data."""
        return _array(self._starts if self._sources is None else self._sources)

    def span(self, document: int) -> tuple[int, int]:
        starts = _array(self._starts)
        return int(starts[document]), int(starts[document + 1])

    def fingerprint(self) -> str:
        parts = [
            "" if numbers is None else f"{_array(numbers).dtype.str} {_sampled(_array(numbers))}"
            for numbers in (self._data, self._starts, self._sources, self._lengths)
        ]
        return fingerprint(*parts, self._eos, self._checksum)

    def check(self) -> None:
        for numbers in (self._data, self._starts, self._sources, self._lengths):
            if isinstance(numbers, MappedFile):
                numbers.check()

    def document_lengths(self) -> Iterator[Ids]:
        starts = _array(self._starts)
        for first in range(0, self._documents, _PORTION):
            yield np.diff(starts[first : first + _PORTION + 1])


def _array(numbers: Raw | MappedFile) -> Raw:
    return numbers.array if isinstance(numbers, MappedFile) else numbers


def _sampled(numbers: Raw) -> str:
    return sample(np.ascontiguousarray(numbers).view(np.uint8).data)


def chained(streams: Sequence[Stream]) -> Stream:
    """Concatenate several streams into one."""
    return streams[0] if len(streams) == 1 else Chain(streams)


class Chain:
    """Several concatenated streams."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = tuple(streams)
        self._edges = np.cumsum([0, *map(len, streams)])
        self._document_edges = np.cumsum([0, *(stream.documents for stream in streams)])
        self._counted = all(stream.read_bytes(0, 0) is not None for stream in streams)

    def __len__(self) -> int:
        return int(self._edges[-1])

    @property
    def documents(self) -> int:
        return int(self._document_edges[-1])

    def read(self, first: int, last: int, out: Ids) -> None:
        for stream, shift, low, high in self._parts(first, last):
            stream.read(low - shift, high - shift, out[low - first : high - first])

    def block(self, firsts: Ids, count: int) -> Raw | None:
        return None

    def read_bytes(self, first: int, last: int) -> Ids | None:
        if not self._counted:
            return None
        parts = (
            stream.read_bytes(low - shift, high - shift)
            for stream, shift, low, high in self._parts(first, last)
        )
        known = [part for part in parts if part is not None]
        return np.concatenate([np.zeros(0, np.int64), *known])

    def starts(self, firsts: Ids, lasts: Ids) -> tuple[Ids, Ids]:
        found = [
            np.concatenate([np.zeros(0, np.int64), *self._starts_between(*pair)])
            for pair in zip(firsts.tolist(), lasts.tolist(), strict=True)
        ]
        return np.concatenate(found), np.array([len(some) for some in found])

    def _starts_between(self, first: int, last: int) -> Iterator[Ids]:
        for stream, shift, low, high in self._parts(first, last):
            yield stream.starts(np.array([low - shift]), np.array([high - shift]))[0] + shift

    def place(self, position: int) -> Place:
        stream, shift, _, _ = next(iter(self._parts(position, position + 1)))
        return stream.place(position - shift)

    def span(self, document: int) -> tuple[int, int]:
        number = int(self._document_edges.searchsorted(document, "right")) - 1
        shift = int(self._edges[number])
        first, last = self._streams[number].span(document - int(self._document_edges[number]))
        return first + shift, last + shift

    def fingerprint(self) -> str:
        return fingerprint(*(stream.fingerprint() for stream in self._streams))

    def check(self) -> None:
        for stream in self._streams:
            stream.check()

    def document_lengths(self) -> Iterator[Ids]:
        for stream in self._streams:
            yield from stream.document_lengths()

    def _parts(self, first: int, last: int) -> list[tuple[Stream, int, int, int]]:
        """The streams that contain the positions: (stream, its start, first, last)."""
        last = min(last, len(self))
        low = int(self._edges.searchsorted(first, "right")) - 1
        high = int(self._edges.searchsorted(last, "left"))
        return [
            (
                self._streams[number],
                int(self._edges[number]),
                max(first, int(self._edges[number])),
                min(last, int(self._edges[number + 1])),
            )
            for number in range(low, high)
        ]
