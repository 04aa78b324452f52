"""Token id files: detect how a .bin or .npy was written, from metadata or its content.

Sources, in this order: the .idx next to it (ours or Megatron's), the prepare.json next to it, an
llm.c or NumPy header, the user's setting; otherwise it is read as uint16 if its content is
plausible.
"""

from __future__ import annotations

import ast
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nexus_core.errors import DataError
from nexus_plugins._shared.paths import reason
from nexus_plugins.data_text.binary import TokenFile
from nexus_plugins.data_text.doubts import doubts
from nexus_plugins.data_text.index import scan_ids
from nexus_plugins.data_text.megatron import MEGATRON, open_megatron
from nexus_plugins.data_text.record import Record
from nexus_plugins.data_text.stream import MappedFile, Origin, TokenStream

__all__ = ["IdFile", "PreparedOrigin", "open_ids"]

_OURS = b"NEXUSIDX"
_NUMPY = b"\x93NUMPY"
_LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic: (version, ids)
_LLM_C_HEADER = 1024
_NUMPY_HEADER = 10_000


@dataclass(frozen=True)
class IdFile:
    """An open file of token ids.

    Args:
        ids, starts: its ids, and where documents begin.
        highest: highest id in the file.
        how: how it was read, in words.
        lengths: bytes of text of each id, if known.
        origin: names the document at each position.
        tokenizer: its hash and number of ids, if the file records them.
        checksum: checksum of all ids, if known.
        guessed: whether the id format had to be guessed.
        loss: what the tokenizer lost of the text, if recorded.
    """

    ids: MappedFile
    starts: MappedFile
    highest: int
    how: str
    lengths: MappedFile | None
    origin: Origin
    tokenizer: tuple[str, int] | None = None
    checksum: str = ""
    guessed: bool = False
    loss: Mapping[str, int] = field(default_factory=dict)

    def stream(self) -> TokenStream:
        """All documents."""
        return TokenStream(
            self.ids, self.starts, lengths=self.lengths, origin=self.origin, checksum=self.checksum
        )


@dataclass(frozen=True)
class _Layout:
    """Where the ids of a file are stored, and in which dtype."""

    dtype: str
    offset: int
    how: str
    count: int | None = None
    guessed: bool = False


def open_ids(path: Path, wish: str | None, eos: int | None, cache: Path) -> IdFile:
    """Open a file of ids.

    Args:
        path: NAME.bin or NAME.npy.
        wish: dtype of ids in a file that does not record it, such as "uint32"; None: uint16.
        eos: ends a document if nothing else marks where documents begin.
        cache: the cache folder.

    Raises:
        DataError: it cannot be read, is damaged, or does not hold ids of this kind.
    """
    index = path.with_suffix(".idx")
    indexed = path.suffix.lower() == ".bin" and index.exists()
    magic = _head(index, len(MEGATRON)) if indexed else b""
    if magic.startswith(_OURS):
        return _ours(path, wish)
    if magic.startswith(MEGATRON):
        ids, starts, highest = open_megatron(path, index, cache)
        _agree(path, str(ids.dtype), wish, "its .idx")
        how = f"{ids.dtype} ids with an index of Megatron"
        return IdFile(ids, starts, highest, how, None, PreparedOrigin.of_itself(path, starts))
    if indexed:
        raise DataError(
            f"{index} is neither an index of this trainer nor of Megatron (MMIDIDX), so "
            f"{path.name} cannot be trusted; move it away to read {path.name} without it"
        )
    layout = _layout(path, wish)
    ids = MappedFile(path, layout.dtype, layout.offset, layout.count)
    scan = scan_ids(ids, eos, cache, _check_guess if layout.guessed else None)
    if scan.lowest < 0:
        raise DataError(f"{path} has the negative id {scan.lowest}: {layout.how}; {_WISH}")
    origin = PreparedOrigin.of_itself(path, scan.starts)
    return IdFile(
        ids,
        scan.starts,
        scan.highest,
        layout.how,
        None,
        origin,
        checksum=scan.checksum,
        guessed=layout.guessed,
    )


_WISH = "set data_text.ids_dtype to the dtype of the file"


def _ours(path: Path, wish: str | None) -> IdFile:
    file = TokenFile(path)
    header = file.header
    dtype = f"uint{8 * header.id_bytes}"
    _agree(path, dtype, wish, "its .idx")
    how = f"{dtype} ids with an index of this trainer"
    record = Record.beside(path.parent)
    crc = "" if record is None else str(record.checksums.get(path.name, ""))
    return IdFile(
        file.ids,
        file.starts,
        header.highest,
        how,
        file.lengths,
        PreparedOrigin.of(file),
        (header.tokenizer, header.vocabulary),
        crc,
        loss={} if record is None else record.loss,
    )


def _layout(path: Path, wish: str | None) -> _Layout:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path} is empty; {_AGAIN}")
    head = _head(path, _LLM_C_HEADER)
    layout = _numpy(path, head) or _llm_c(path, head, size) or _recorded(path, size)
    if layout is not None:
        _agree(path, layout.dtype, wish, layout.how)
        return layout
    dtype = _dtype(wish or "uint16")
    if size % dtype.itemsize:
        raise DataError(
            f"{path} is truncated, or not {wish or 'uint16'} ids: {size:,} bytes are not a "
            f"multiple of {dtype.itemsize}; {_AGAIN}, or {_WISH}"
        )
    if wish is not None:
        return _Layout(dtype.str, 0, f"{wish} ids, from data_text.ids_dtype")
    how = "bare uint16 ids (undeclared, but plausible)"
    return _Layout("<u2", 0, how, guessed=True)


def _check_guess(path: Path) -> None:
    why = doubts(path)
    if why is not None:
        raise DataError(f"{path} does not look like uint16 ids: {why}")


_AGAIN = "write it again, or prepare it with: nexus-data prepare"


def _dtype(name: str) -> np.dtype[np.generic]:
    found = np.dtype(name.removesuffix("be"))
    return found.newbyteorder(">" if name.endswith("be") else "<")


def _agree(path: Path, found: str, wish: str | None, source: str) -> None:
    if wish is not None and np.dtype(found) != _dtype(wish):
        raise DataError(
            f"{path} has {np.dtype(found).name} ids according to {source}, but data_text.ids_dtype "
            f"is {wish}; remove data_text.ids_dtype, which is for files that do not declare one"
        )


def _head(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error


def _check_size(path: Path, size: int, expected: int, source: str) -> None:
    if size != expected:
        what = "is truncated" if size < expected else "is too long"
        raise DataError(
            f"{path} {what}: {size:,} bytes, but {source} says {expected:,}; copy it again, or "
            f"{_AGAIN}"
        )


def _llm_c(path: Path, head: bytes, size: int) -> _Layout | None:
    if len(head) < _LLM_C_HEADER:
        return None
    magic, version, count = struct.unpack_from("<3i", head)
    if magic not in _LLM_C:
        return None
    expected, name = _LLM_C[magic]
    if version != expected or count < 0:
        raise DataError(f"{path} has an llm.c header of version {version}; known: {expected}")
    dtype = np.dtype(name)
    _check_size(path, size, _LLM_C_HEADER + count * dtype.itemsize, "the llm.c header")
    return _Layout(dtype.str, _LLM_C_HEADER, f"{name} ids with an llm.c header", count)


def _numpy(path: Path, head: bytes) -> _Layout | None:
    """Parse NumPy's header without executing anything."""
    if not head.startswith(_NUMPY):
        if path.suffix.lower() == ".npy":
            raise DataError(f"{path} is not a NumPy .npy file; {_AGAIN}")
        return None
    try:
        wide = head[6] > 1
        (length,) = struct.unpack_from("<I" if wide else "<H", head, 8)
        begin = 12 if wide else 10
        if length > _NUMPY_HEADER:
            raise ValueError(f"a header of {length} bytes")
        raw = _head(path, begin + length)[begin:]
        said = ast.literal_eval(raw.decode("latin-1").strip())
        dtype, shape = np.dtype(said["descr"]), tuple(said["shape"])
        fits = dtype.kind in "ui" and all(isinstance(one, int) and one >= 0 for one in shape)
    except (struct.error, ValueError, TypeError, KeyError, SyntaxError, IndexError,
            RecursionError, MemoryError) as error:  # fmt: skip
        raise DataError(f"{path} has a damaged NumPy header ({error!r:.100}); {_AGAIN}") from None
    if not fits or len(shape) != 1:
        raise DataError(
            f"{path} has dtype {dtype} and shape {shape}; expected a 1-d array of integers"
        )
    _check_size(
        path, path.stat().st_size, begin + length + shape[0] * dtype.itemsize, "NumPy's header"
    )
    how = f"{dtype.name} ids with a NumPy header"
    return _Layout(dtype.str, begin + length, how, shape[0])


def _recorded(path: Path, size: int) -> _Layout | None:
    """The header recorded in prepare.json, if the .idx is missing."""
    record = Record.beside(path.parent)
    count = record.tokens(path.name) if record is not None else None
    if count is None:
        return None
    if size not in (2 * count, 4 * count):
        raise DataError(
            f"{path} is truncated or too long: {size:,} bytes, but prepare.json says {count:,} "
            f"ids; copy it again, or {_AGAIN}"
        )
    name = "uint16" if size == 2 * count else "uint32"
    return _Layout(np.dtype(name).str, 0, f"{name} ids, from prepare.json (its .idx is missing)")


@dataclass(frozen=True)
class PreparedOrigin:
    """Maps documents of an id file to the files that it was prepared from.

    Args:
        files: path and document count of each.
        starts: where the documents begin in the id file.
        origins: the index of each document in the input; None: the same as in the file.
    """

    files: tuple[tuple[str, int], ...]
    starts: MappedFile
    origins: MappedFile | None

    @classmethod
    def of(cls, file: TokenFile) -> PreparedOrigin:
        """Read what `prepare` recorded next to the file."""
        record = None if file.origins is None else Record.beside(file.path.parent)
        if record is None:
            return cls.of_itself(file.path, file.starts)
        return cls(record.files, file.starts, file.origins)

    @classmethod
    def of_itself(cls, path: Path, starts: MappedFile) -> PreparedOrigin:
        """Documents identified only by their index in the file."""
        return cls(((str(path), 1 << 62),), starts, None)

    def name(self, document: int, source: int) -> tuple[str, int]:
        number = int(self.starts.array.searchsorted(source, "right")) - 1
        if self.origins is not None:
            number = int(self.origins.array[number])
        for name, count in self.files:
            if number < count:
                return name, number
            number -= count
        return "unknown", number
