"""The document index of a large file: built once, cached, then memory-mapped."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_core.errors import DataError
from nexus_plugins._shared.cache import cached, fingerprint, signature
from nexus_plugins.data_text.formats import BOM, Reading, is_utf8, read_slice, whole, whole_lines
from nexus_plugins.data_text.stream import MappedFile, TokenStream

__all__ = [
    "LineOrigin",
    "NoDocumentError",
    "Scan",
    "held_out",
    "open_text",
    "scan_ids",
    "split_documents",
]

Ids = NDArray[np.int64]
_BLOCK = 4 << 20  # bytes, or ids
_PARTS = ("train", "valid")


class NoDocumentError(DataError):
    """A file is readable but contains no text."""


def held_out(checksums: Ids, share: float) -> NDArray[np.bool_]:
    """Which documents are held out: a function of each document's CRC-32 only.

    So copies of a document end up in the same split.
    """
    mixed = checksums.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    chosen: NDArray[np.bool_] = (mixed >> np.uint64(11)) < np.uint64(int(share * 2**53))
    return chosen


@dataclass(frozen=True)
class LineOrigin:
    """Counts the documents before a byte of a text file; slow, for interactive queries."""

    path: Path
    reading: Reading

    def name(self, document: int, source: int) -> tuple[str, int]:
        if self.reading.one_file_one_document:
            return str(self.path), 0
        number = 0
        for block, offset in _lines(self.path):
            begins, _ = _documents(block)
            number += int(((begins + offset) < source).sum())
            if offset + len(block) > source:
                break
        return str(self.path), number


def open_text(
    path: Path, reading: Reading, share: float, eos: int, cache: Path
) -> list[TokenStream]:
    """Streams over the bytes of a .txt file: training, plus evaluation if `share` is not 0.

    On first use, the file is read once in small pieces, checked for UTF-8 and indexed; memory use
    does not grow with its size.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or holds no document.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; remove it, or add text")

    def build(folder: Path) -> None:
        _index(path, reading, share, folder)
        _check_same(path, signed)

    signed = signature([path], changes=True)
    key = fingerprint("text", signed, share, reading.one_file_one_document)
    folder = cached(cache, f"lines-{key}", build)
    checksum = (folder / "checksum").read_text()
    return [
        TokenStream(
            MappedFile(path),
            MappedFile(folder / f"{part}.starts", "i8"),
            sources=MappedFile(folder / f"{part}.sources", "i8"),
            eos=eos,
            origin=LineOrigin(path, reading),
            checksum=checksum,
        )
        for part in _PARTS[: 2 if share else 1]
    ]


def _check_same(path: Path, signed: list[list[str | int]]) -> None:
    if signature([path], changes=True) != signed:
        raise DataError(f"{path} changed while it was read; start again when it is complete")


def _index(path: Path, reading: Reading, share: float, folder: Path) -> None:
    with ExitStack() as stack:
        parts = _PARTS[: 2 if share else 1]
        writers = [stack.enter_context(_IndexWriter(folder, part, eos=1)) for part in parts]
        crc = [0]
        for begins, ends, checksums in _found(path, reading, bool(share), crc):
            valid = held_out(checksums, share) if share else np.zeros(len(begins), np.bool_)
            for writer, chosen in zip(writers, (~valid, valid), strict=False):
                writer.append(begins[chosen], (ends - begins)[chosen])
        if not any(writer.documents for writer in writers):
            raise NoDocumentError(f"{path} has no text, only blank lines; remove it")
        (folder / "checksum").write_text(f"{crc[0]:08x}")


def _found(
    path: Path, reading: Reading, hashed: bool, crc: list[int]
) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Start, end and CRC-32 of documents, in bytes of the file; adds all text to `crc`."""
    if reading.one_file_one_document:
        found = _whole_file(path, reading)
        crc[0] = int(found[2][0])
        yield found
        return
    for block, offset in _lines(path):
        crc[0] = zlib.crc32(block, crc[0])
        if not is_utf8(block):
            _complain(path, reading)
        begins, ends = _documents(block)
        pairs = zip(begins.tolist(), ends.tolist(), strict=True)
        view = memoryview(block)
        checksums = [zlib.crc32(view[begin:end]) for begin, end in pairs] if hashed else []
        yield begins + offset, ends + offset, np.array(checksums, np.int64)


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as file:
        offset = len(BOM) if file.read(len(BOM)) == BOM else 0
    for block in whole_lines(whole(path)):
        yield block, offset
        offset += len(block)


def _documents(block: bytes) -> tuple[Ids, Ids]:
    """Start and end of each line that is not blank, without its line break."""
    letters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(letters == 10)
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    begins = np.concatenate([[0], ends[:-1] + 1])
    ends = ends - ((ends > begins) & (letters[ends - 1] == 13))
    doubtful = np.flatnonzero(
        (ends == begins) | (letters[np.minimum(begins, len(block) - 1)] <= 32)
    )
    kept = np.ones(len(begins), np.bool_)
    for line in doubtful.tolist():
        kept[line] = bool(block[begins[line] : ends[line]].strip())
    return begins[kept], ends[kept]


def _whole_file(path: Path, reading: Reading) -> tuple[Ids, Ids, Ids]:
    checksum, offset = 0, -1
    for block, begin in _lines(path):
        if not is_utf8(block):
            _complain(path, reading)
        checksum = zlib.crc32(block, checksum)
        offset = begin if offset < 0 else offset
    if offset < 0:
        raise NoDocumentError(f"{path} is empty except for a byte-order mark; remove it")
    size = path.stat().st_size
    return np.array([offset]), np.array([size]), np.array([checksum])


def _complain(path: Path, reading: Reading) -> None:
    """Read the rest with the reader whose errors name line and byte."""
    for _ in read_slice(whole(path), reading):
        pass


class _IndexWriter:
    """Writes `NAME.starts` and `NAME.sources`; complete when the context exits."""

    def __init__(self, folder: Path, name: str, eos: int = 0) -> None:
        self._starts = (folder / f"{name}.starts").open("wb")
        self._sources = (folder / f"{name}.sources").open("wb")
        self._eos = eos
        self._tokens = 0
        self.documents = 0

    def append(self, sources: Ids, lengths: Ids) -> None:
        """Add documents: the position and length of each."""
        ends = (lengths + self._eos).cumsum() + self._tokens
        self._starts.write((ends - lengths - self._eos).astype("<i8").tobytes())
        self._sources.write(sources.astype("<i8").tobytes())
        self.documents += len(sources)
        self._tokens = int(ends[-1]) if len(ends) else self._tokens

    def __enter__(self) -> _IndexWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._starts.write(np.array([self._tokens], "<i8").tobytes())
        self._starts.close()
        self._sources.close()


@dataclass(frozen=True)
class Scan:
    """What a scan of a raw id file found.

    Args:
        lowest, highest: lowest and highest id.checksum: checksum of all ids.
        starts: where each document begins, and the number of tokens.
    """

    lowest: int
    highest: int
    checksum: str
    starts: MappedFile


def scan_ids(
    file: MappedFile, eos: int | None, cache: Path, check: Callable[[Path], None] | None = None
) -> Scan:
    """Scan raw ids once for the highest id and for documents that end in eos.

    Args:
        file: the ids.
        eos: the id that ends a document; None: the file is one document.
        cache: the cache folder.
        check: called before the first read; raises if the file is not what it is assumed to be.

    Raises:
        DataError: no document is found.
    """
    if not len(file.array):
        raise DataError(f"{file.path} has no ids; remove it")

    def build(folder: Path) -> None:
        if check is not None:
            check(file.path)
        ids, lowest, highest, last, checksum = file.array, 0, 0, 0, 0
        with (folder / "starts").open("wb") as starts:
            starts.write(bytes(8))
            for first in range(0, len(ids), _BLOCK):
                portion = ids[first : first + _BLOCK]
                checksum = zlib.crc32(portion.view(np.uint8).data, checksum)
                lowest, highest = min(lowest, int(portion.min())), max(highest, int(portion.max()))
                if eos is not None and len(ends := np.flatnonzero(portion == eos)):
                    last = first + 1 + int(ends[-1])
                    starts.write((ends + (first + 1)).astype("<i8").tobytes())
            if last < len(ids):
                starts.write(np.array([len(ids)], "<i8").tobytes())
        _check_same(file.path, signed)
        found = {"lowest": lowest, "highest": highest, "checksum": f"{checksum:08x}"}
        (folder / "scan.json").write_text(json.dumps(found))

    layout = (file.dtype.str, file.offset, len(file.array), check is not None)
    signed = signature([file.path], changes=True)
    folder = cached(cache, f"ids-{fingerprint('ids', signed, layout, eos)}", build)
    found = json.loads((folder / "scan.json").read_text())
    return Scan(**found, starts=MappedFile(folder / "starts", "i8"))


def split_documents(
    path: Path, ids: MappedFile, starts: MappedFile, share: float, cache: Path, **settings: Any
) -> list[TokenStream]:
    """Split the documents of a .bin file into training and evaluation.

    Args:
        path: the file, for the cache key.
        ids, starts: its contents.
        share: share of the documents held out for evaluation.
        cache: the cache folder.
        settings: further settings of the streams.
    """

    def build(folder: Path) -> None:
        edges, tokens = starts.array, ids.array.data
        with ExitStack() as stack:
            writers = [stack.enter_context(_IndexWriter(folder, part)) for part in _PARTS]
            for first in range(0, len(edges) - 1, _BLOCK):
                some = edges[first : first + _BLOCK + 1]
                checksums = [
                    zlib.crc32(tokens[begin:end]) for begin, end in pairwise(some.tolist())
                ]
                valid = held_out(np.array(checksums), share)
                for writer, chosen in zip(writers, (~valid, valid), strict=True):
                    writer.append(some[:-1][chosen], np.diff(some)[chosen])

    key = fingerprint("split", signature([path, starts.path], changes=True), share)
    folder = cached(cache, f"split-{key}", build)
    return [
        TokenStream(
            ids,
            MappedFile(folder / f"{part}.starts", "i8"),
            sources=MappedFile(folder / f"{part}.sources", "i8"),
            **settings,
        )
        for part in _PARTS
    ]
