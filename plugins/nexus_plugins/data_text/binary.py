"""Token files: NAME.bin holds ids, NAME.idx where each document begins.

NAME.bin is a bare array of ids, little-endian uint16, or uint32 where the vocabulary has more than
65,536 ids. NAME.idx, little-endian:

    offset  size  content
    0       8     "NEXUSIDX"
    8       4     version, 1
    12      4     bytes of an id, 2 or 4
    16      8     documents, n
    24      8     tokens
    32      8     highest id
    40      8     size of the vocabulary
    48      8     bytes of text
    56      4     flags: 1, origins follow; 2, NAME.len has the bytes of text behind each token
    60      32    SHA-256 of the tokenizer
    92      4     CRC-32 of the 92 bytes before
    96      8n+8  where each document begins, and the number of tokens
    ...     8n    the number of each document among all that went in (flag 1)

NAME.len is a bare array of little-endian uint32. NAME.meta.jsonl, where it exists, has one line a
document: its metadata as JSON, or null. `ids` reads a .bin without .idx.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nexus_core.errors import DataError
from nexus_plugins._shared.paths import reason
from nexus_plugins.data_text.stream import MappedFile

__all__ = ["Header", "TokenFile", "TokenWriter", "id_type"]

_MAGIC = b"NEXUSIDX"
_LAYOUT = struct.Struct("<8sII5QI32s")
_HEADER = _LAYOUT.size + 4
_ORIGINS, _LENGTHS = 1, 2
_PORTION = 1 << 20

Ids = NDArray[np.int64]


def id_type(vocabulary: int) -> str:
    """The dtype in which ids of a vocabulary are stored."""
    return "<u2" if vocabulary <= 1 << 16 else "<u4"


@dataclass(frozen=True)
class Header:
    """The header of a .idx file."""

    documents: int
    tokens: int
    highest: int
    vocabulary: int
    text_bytes: int
    id_bytes: int
    flags: int
    tokenizer: str

    def pack(self) -> bytes:
        """The first 96 bytes of the file."""
        packed = _LAYOUT.pack(
            _MAGIC,
            1,
            self.id_bytes,
            self.documents,
            self.tokens,
            self.highest,
            self.vocabulary,
            self.text_bytes,
            self.flags,
            bytes.fromhex(self.tokenizer),
        )
        return packed + struct.pack("<I", zlib.crc32(packed))

    @classmethod
    def unpack(cls, raw: bytes, path: Path) -> Header:
        """Parse the first 96 bytes.

        Raises:
            DataError: they are not a header that `pack` wrote.
        """
        if len(raw) < _HEADER or raw[:8] != _MAGIC:
            raise DataError(f"{path} is not a .idx file of this trainer; {_AGAIN}")
        if zlib.crc32(raw[: _LAYOUT.size]) != struct.unpack_from("<I", raw, _LAYOUT.size)[0]:
            raise DataError(f"{path} is damaged: its header does not match its checksum; {_AGAIN}")
        _, version, width, documents, tokens, highest, vocabulary, text, flags, digest = (
            _LAYOUT.unpack_from(raw)
        )
        if version != 1 or width not in (2, 4):
            raise DataError(f"{path} has version {version}; this release reads version 1; {_AGAIN}")
        return cls(documents, tokens, highest, vocabulary, text, width, flags, digest.hex())


_AGAIN = "rebuild it with: nexus-data prepare"


class TokenFile:
    """A .bin with its .idx, validated and memory-mapped.

    Args:
        path: NAME.bin; NAME.idx must be next to it.

    Raises:
        DataError: one of the files is missing or truncated, or they do not match.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path.with_suffix(".idx")
        raw = MappedFile(index).array[:_HEADER].tobytes()
        self.header = header = Header.unpack(raw, index)
        self._check_size(index, _HEADER + 8 * (header.documents + 1) + self._origins_size())
        self._check_size(path, header.tokens * header.id_bytes)
        if header.highest >= header.vocabulary and header.tokens:
            raise DataError(
                f"{path} holds id {header.highest}, but its vocabulary has {header.vocabulary} "
                f"ids; {_AGAIN}"
            )
        self.ids = MappedFile(path, f"u{header.id_bytes}")
        self.starts = MappedFile(index, "i8", _HEADER, header.documents + 1)
        self.origins = self._open_origins(index)
        self.lengths = self._open_lengths()
        self._check_starts(index)

    def _origins_size(self) -> int:
        return 8 * self.header.documents if self.header.flags & _ORIGINS else 0

    def _check_size(self, path: Path, expected: int) -> None:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {reason(error)}; {_AGAIN}") from error
        if size != expected:
            what = "is truncated" if size < expected else "is too long"
            raise DataError(
                f"{path} {what}: {size:,} bytes instead of {expected:,}; copy it again, or {_AGAIN}"
            )

    def _open_origins(self, index: Path) -> MappedFile | None:
        if not self.header.flags & _ORIGINS:
            return None
        return MappedFile(index, "i8", _HEADER + 8 * (self.header.documents + 1))

    def _open_lengths(self) -> MappedFile | None:
        if not self.header.flags & _LENGTHS:
            return None
        path = self.path.with_suffix(".len")
        self._check_size(path, 4 * self.header.tokens)
        return MappedFile(path, "u4")

    def _check_starts(self, index: Path) -> None:
        starts = self.starts.array
        ends_right = int(starts[0]) == 0 and int(starts[-1]) == self.header.tokens
        for first in range(0, len(starts), _PORTION):
            some = starts[first : first + _PORTION + 1]
            backwards = some[1:] < some[:-1]  # a difference could run over
            if not ends_right or backwards.any():
                at = first + int(backwards.argmax()) if ends_right else 0
                raise DataError(
                    f"{index}: document offsets decrease or exceed the "
                    f"{self.header.tokens:,} tokens of {self.path.name} (at document {at}); "
                    f"{_AGAIN}"
                )


class TokenWriter:
    """Writes NAME.bin and NAME.idx under temporary names, and renames them when complete.

    Args:
        stem: the path without its suffix.
        vocabulary: its size, which determines the width of ids.
        tokenizer: the hash of the tokenizer.
        with_lengths: whether `append` is given the bytes of each token.
    """

    def __init__(self, stem: Path, vocabulary: int, tokenizer: str, with_lengths: bool) -> None:
        self._stem = stem
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._dtype = np.dtype(id_type(vocabulary))
        self._files: dict[str, IO[bytes]] = {}
        self.documents = self.tokens = self.text_bytes = self._highest = 0
        self.checksum = 0
        for kind in ("bin", "starts", "origins", "meta.jsonl", *(["len"] if with_lengths else [])):
            self._files[kind] = self._name(kind).open("w+b")
        self._has_metadata = False

    def _name(self, kind: str, temporary: bool = True) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{kind}{'.tmp' if temporary else ''}")

    def append(
        self,
        ids: NDArray[Any],
        lengths: Ids,
        origins: Ids,
        text_bytes: int,
        metadata: Sequence[str] | None = None,
        token_bytes: NDArray[Any] | None = None,
    ) -> None:
        """Append documents: their concatenated ids, and the length of each."""
        if not len(lengths):
            return
        ends = lengths.cumsum()
        self._files["starts"].write((ends - lengths + self.tokens).astype("<i8").tobytes())
        self._files["origins"].write(origins.astype("<i8").tobytes())
        raw = np.ascontiguousarray(ids, self._dtype).view(np.uint8).data
        self.checksum = zlib.crc32(raw, self.checksum)
        self._files["bin"].write(raw)
        if token_bytes is not None:
            self._files["len"].write(token_bytes.astype("<u4").tobytes())
        self._write_metadata(metadata, len(lengths))
        self._highest = max(self._highest, int(ids.max(initial=0)))
        self.documents += len(lengths)
        self.tokens += int(ends[-1])
        self.text_bytes += text_bytes

    def _write_metadata(self, metadata: Sequence[str] | None, documents: int) -> None:
        file = self._files["meta.jsonl"]
        if metadata is not None and not self._has_metadata:
            self._has_metadata = True
            for _ in range(self.documents):
                file.write(b"null\n")
        if self._has_metadata:
            lines = ["null"] * documents if metadata is None else metadata
            file.write("".join(f"{line}\n" for line in lines).encode())

    def finish(self) -> Header:
        """Finish the files: sync them to disk and rename them."""
        flags = _ORIGINS | (_LENGTHS if "len" in self._files else 0)
        header = Header(
            self.documents,
            self.tokens,
            self._highest,
            self._vocabulary,
            self.text_bytes,
            self._dtype.itemsize,
            flags,
            self._tokenizer,
        )
        with self._name("idx").open("wb") as index:
            index.write(header.pack())
            _copy(self._files["starts"], index)
            index.write(struct.pack("<q", self.tokens))
            _copy(self._files["origins"], index)
            _sync(index)
        kept = [kind for kind in self._files if kind in ("bin", "len")]
        kept += ["meta.jsonl"] if self._has_metadata else []
        for kind, file in self._files.items():
            if kind in kept:
                _sync(file)
            file.close()
        for kind in (*kept, "idx"):  # the index last: with it, the rest is complete
            self._name(kind).replace(self._name(kind, temporary=False))
        for kind in set(self._files) - set(kept):
            self._name(kind).unlink()
        return header

    def abandon(self) -> None:
        """Close and delete unfinished files; files that `finish` has renamed stay."""
        for kind, file in self._files.items():
            file.close()
            self._name(kind).unlink(missing_ok=True)
        self._name("idx").unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    source.seek(0)
    for chunk in iter(lambda: source.read(_PORTION), b""):
        target.write(chunk)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
