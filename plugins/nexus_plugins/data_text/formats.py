"""Files of text and the documents in them: lines, JSON lines (also .gz and .zst) and Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

from nexus_core.errors import DataError
from nexus_plugins._shared.paths import reason

__all__ = [
    "BOM",
    "KNOWN",
    "SUFFIXES",
    "Format",
    "Portion",
    "Reading",
    "Slice",
    "format_of",
    "is_text",
    "is_utf8",
    "package",
    "read_slice",
    "slices_of",
    "suffix_of",
    "whole",
    "whole_lines",
]

_BLOCK = 4 << 20  # bytes read at a time
_PIECE = 1 << 15  # bytes checked at a time
_SLICE = 4 << 20  # bytes of a file per slice
_LONG = 16 << 20  # bytes; longer lines are not copied
_LONGEST = 1 << 30  # maximum bytes of a document
_WINDOW = 1 << 31  # maximum zstd window, enough for `zstd --long=31`
BOM = b"\xef\xbb\xbf"
_PACKINGS = ("", ".gz", ".zst")
_KINDS: dict[str, Literal["lines", "json"]] = {
    ".txt": "lines",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
_IDS = (".bin", ".npy")
KNOWN = ".txt, .jsonl, .ndjson, .json (each also .gz, .zst), .parquet, .bin, .npy"
SUFFIXES = (*(kind + packing for kind in _KINDS for packing in _PACKINGS), ".parquet", *_IDS)


@dataclass(frozen=True)
class Format:
    """How a file is read.

    Args:
        kind: "lines" of text, "json" objects a line, "parquet" or "ids".
        packing: ".gz", ".zst" or "".
    """

    kind: Literal["lines", "json", "parquet", "ids"]
    packing: str = ""


@dataclass(frozen=True)
class Reading:
    """How documents are read from files.

    Args:
        text_key: key or column of the text in JSON lines and .parquet.
        one_file_one_document: treat a text file as one document instead of one per line.
        invalid_utf8: "error", "replace" (by U+FFFD) or "skip" (the document).
        as_text: read every file as text, whatever its suffix.
    """

    text_key: str = "text"
    one_file_one_document: bool = False
    invalid_utf8: str = "error"
    as_text: bool = False


@dataclass(frozen=True)
class Slice:
    """A part of a file that can be read on its own.

    Args:
        path: the file.
        first, last: bytes of a file of lines (the lines that begin there), row groups of
            .parquet; a compressed file has one slice.
        size: approximate bytes of the file.
    """

    path: str
    first: int
    last: int
    size: int


@dataclass
class Portion:
    """Some documents of a slice, in order.

    Args:
        texts: valid UTF-8, not empty.
        numbers: the index of each document in the slice, counting skipped ones.
        metadata: JSON of each document's `metadata`, if any has one.
        skipped: number of documents skipped because they are not UTF-8.
        replaced: number of documents in which bytes were replaced.
        empty: number of documents skipped because they have no text (blank lines do not count).
    """

    texts: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    metadata: list[str | None] = field(default_factory=list)
    skipped: int = 0
    replaced: int = 0
    empty: int = 0

    def add(
        self, number: int, raw: bytes, policy: str, where: Callable[[], str], metadata: Any = None
    ) -> None:
        """Add a document, following the policy for invalid UTF-8."""
        try:
            if not is_utf8(raw):
                raw.decode()
        except UnicodeDecodeError as error:
            if policy == "error":
                raise DataError(_not_utf8(where(), raw[error.start], error.start)) from None
            if policy == "skip":
                self.skipped += 1
                return
            raw = raw.decode(errors="replace").encode()
            self.replaced += 1
        if not raw:
            self.empty += 1
            return
        self.texts.append(raw)
        self.numbers.append(number)
        try:
            self.metadata.append(None if metadata is None else json.dumps(metadata, default=str))
        except RecursionError:
            raise DataError(f"{where()}: 'metadata' is nested too deeply; remove it") from None


def suffix_of(path: Path, as_text: bool = False) -> str:
    """The suffix that determines the format, such as `.jsonl.gz`; "" if unknown."""
    name = path.name.lower()
    if as_text:
        return next(
            (".txt" + packing for packing in _PACKINGS[1:] if name.endswith(packing)), ".txt"
        )
    return next((known for known in SUFFIXES[::-1] if name.endswith(known)), "")


def format_of(path: Path, as_text: bool = False) -> Format:
    """How a file is read: if its suffix is unknown, as lines of text."""
    suffix = suffix_of(path, as_text)
    if suffix == ".parquet":
        return Format("parquet")
    if suffix in _IDS:
        return Format("ids")
    kind, packing, _ = (
        suffix.partition(".gz") if suffix.endswith(".gz") else suffix.partition(".zst")
    )
    return Format(_KINDS.get(kind, "lines"), packing)


def is_text(path: Path, as_text: bool = False) -> bool:
    """Whether the file holds text rather than ids."""
    return as_text or suffix_of(path) not in _IDS


def slices_of(path: Path, reading: Reading | None = None) -> list[Slice]:
    """Split a file into slices; the boundaries depend only on the file."""
    reading = reading or Reading()
    form = format_of(path, reading.as_text)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    if size == 0:
        raise DataError(f"{path} is empty; remove it, or add text")
    if form.kind == "parquet":
        from nexus_plugins.data_text.parquet import parquet_slices

        return parquet_slices(path)
    in_one = form.packing or (form.kind == "lines" and reading.one_file_one_document)
    edges = [*range(0, size, size if in_one else _SLICE), size]
    return [Slice(str(path), *pair, pair[1] - pair[0]) for pair in pairwise(edges)]


def whole(path: Path) -> Slice:
    """One slice that spans the whole file."""
    size = path.stat().st_size
    return Slice(str(path), 0, size, size)


def read_slice(part: Slice, reading: Reading) -> Iterator[Portion]:
    """The documents of a slice, a few megabytes at a time.

    Raises:
        DataError: the file cannot be read, or a document in it cannot be used.
    """
    path = Path(part.path)
    form = format_of(path, reading.as_text)
    try:
        if form.kind == "ids":
            raise DataError(f"{path} is not a text file")
        if form.kind == "parquet":
            from nexus_plugins.data_text.parquet import read_parquet

            yield from read_parquet(part, reading)
        elif form.kind == "lines" and reading.one_file_one_document:
            yield _take_file(part, form, reading)
        else:
            take = _take_lines if form.kind == "lines" else _take_json
            yield from _read_lines(part, form.packing, reading, take)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error


def _take_file(part: Slice, form: Format, reading: Reading) -> Portion:
    content = bytearray()
    for block in _decompressed(part, form.packing) if form.packing else _plain(part):
        content += block
        _check_length(len(content), part)
    raw = _taken(content)
    portion = Portion()
    portion.add(0, raw.removeprefix(BOM), reading.invalid_utf8, lambda: part.path)
    return portion


def _check_length(size: int, part: Slice) -> None:
    if size > _LONGEST:
        raise DataError(
            f"{part.path} has a document of more than {_LONGEST >> 20:,} MiB; documents must fit "
            "in memory: split it into several lines"
        )


_Take = Callable[[list[bytes], Reading, int, Callable[[int], str]], Portion]


def _read_lines(part: Slice, packing: str, reading: Reading, take: _Take) -> Iterator[Portion]:
    line, number = 0, 0
    for block in whole_lines(part, packing):
        breaks, blocks = block.count(b"\n"), [block]
        del block  # it may be one long line, so keep no second reference
        portion = take(blocks, reading, number, _namer(part, line))
        line += breaks
        number += len(portion.texts) + portion.skipped + portion.empty
        yield portion


def _namer(part: Slice, line: int) -> Callable[[int], str]:
    """Names a line of a block in an error; lines before the slice are only counted then."""

    def name(offset: int) -> str:
        before = 0
        if part.first:
            with Path(part.path).open("rb") as file:
                blocks = iter(lambda: file.read(min(_BLOCK, part.first - file.tell())), b"")
                before = sum(block.count(b"\n") for block in blocks)
                file.seek(part.first - 1)
                before += file.read(1) != b"\n"  # an earlier line is not in this slice
        return f"{part.path}, line {before + line + offset + 1}"

    return name


def _take_lines(
    blocks: list[bytes], reading: Reading, number: int, where: Callable[[int], str]
) -> Portion:
    """One document per line, skipping blank lines."""
    block = blocks.pop()
    lines = block.split(b"\n")
    if b"\r" in block:
        lines = [line.removesuffix(b"\r") for line in lines]
    if not is_utf8(block):
        return _take_doubtful(lines, reading, number, where)
    texts = [line for line in lines if line and not line.isspace()]
    numbers = list(range(number, number + len(texts)))
    return Portion(texts, numbers, [None] * len(texts))


def _take_doubtful(
    lines: list[bytes], reading: Reading, number: int, where: Callable[[int], str]
) -> Portion:
    portion = Portion()
    for offset, line in enumerate(lines):
        if line and not line.isspace():
            portion.add(number, line, reading.invalid_utf8, lambda at=offset: where(at))  # type: ignore[misc]
            number += 1
    return portion


def _take_json(
    blocks: list[bytes], reading: Reading, number: int, where: Callable[[int], str]
) -> Portion:
    """One JSON object per line, with its text under a key."""
    if _is_one_long_line(blocks[0]):
        return _take_long_json(blocks, reading, number, where)
    portion = Portion()
    policy = reading.invalid_utf8
    for offset, line in enumerate(blocks.pop().split(b"\n")):
        if not line or line.isspace():
            continue
        try:
            entry = json.loads(line.decode(errors="strict" if policy == "error" else "replace"))
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(where(offset), line[error.start], error.start)) from None
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where(offset)} is not JSON ({error}); expected one object per line, such as "
                f'{{"{reading.text_key}": "..."}}{_of_array(line)}'
            ) from None
        text = _text_of(entry, reading.text_key, lambda at=offset: where(at))  # type: ignore[misc]
        damaged = policy != "error" and not is_utf8(line)
        raw = b"\xff" if damaged and policy == "skip" else text.encode(errors="surrogatepass")
        portion.replaced += damaged and policy == "replace"
        portion.add(number, raw, policy, lambda at=offset: where(at), entry.get("metadata"))  # type: ignore[misc]
        number += 1
    return portion


def _is_one_long_line(block: bytes) -> bool:
    """Whether a block is one line of valid UTF-8 without \\u, too long to copy."""
    breaks = block.find(b"\n")
    long = len(block) > _LONG and breaks in (-1, len(block) - 1)
    return long and b"\\u" not in block and is_utf8(block)


def _take_long_json(
    blocks: list[bytes], reading: Reading, number: int, where: Callable[[int], str]
) -> Portion:
    """Like `_take_json`, but never holds more than two copies of the line.

    Each byte is decoded as one character. Without \\u, the characters of a string are then the
    bytes of its UTF-8, and take one byte each, whereas a single rare letter would make it four.
    """
    line = blocks.pop().decode("latin-1")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where(0)} is not JSON ({error}); expected one object per line") from None
    del line
    key = reading.text_key.encode().decode("latin-1")
    known = isinstance(entry, dict) and isinstance(entry.get(key), str)
    raw = entry.pop(key).encode("latin-1") if known else b""
    rest = json.loads(json.dumps(entry, ensure_ascii=False).encode("latin-1"))
    if not known:
        _text_of(rest, reading.text_key, lambda: where(0))
    portion = Portion()
    portion.add(number, raw, reading.invalid_utf8, lambda: where(0), rest.get("metadata"))
    return portion


def _text_of(entry: Any, key: str, where: Callable[[], str]) -> str:
    if not isinstance(entry, dict):
        raise DataError(
            f"{where()} is {_kind(entry)}; expected an object such as "
            f'{{"{key}": "..."}}{_of_array(b"[" if isinstance(entry, list) else b"")}'
        )
    if key not in entry:
        raise DataError(
            f"{where()} has no key '{key}', only {', '.join(map(repr, [*entry][:9])) or 'none'}; "
            "set data_text.text_key (--text-key) to the key of the text"
        )
    text = entry[key]
    if not isinstance(text, str):
        raise DataError(f"{where()}: '{key}' is {_kind(text)}; expected a string")
    return text


def _of_array(line: bytes) -> str:
    """Advice for a file that is a single array."""
    if not line.lstrip().startswith(b"["):
        return ""
    return "; convert an array to such lines with: jq -c '.[]' FILE > FILE.jsonl"


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def is_utf8(raw: bytes) -> bool:
    """Whether bytes are UTF-8; in small pieces, because most are pure ASCII."""
    begin = 0
    while begin < len(raw):
        end = begin + _PIECE
        while end < len(raw) and raw[end] & 0xC0 == 0x80:  # not within a character
            end += 1
        piece = raw[begin:end]
        try:
            if not piece.isascii():
                piece.decode()
        except UnicodeDecodeError:
            return False
        begin = end
    return True


def _not_utf8(where: str, value: int, byte: int) -> str:
    return (
        f"{where}, byte {byte + 1} (0x{value:02x}) is not UTF-8{_guess(value, byte)}; convert the "
        "file, or set data_text.invalid_utf8 to 'replace' or 'skip' (nexus-data: --invalid-utf8)"
    )


def _guess(value: int, byte: int) -> str:
    """Guess the type of a file that does not start as UTF-8, for an error."""
    known = {(0xFF, 0): "UTF-16", (0xFE, 0): "UTF-16", (0x8B, 1): "gzip", (0xB5, 1): "zstd"}
    return f" (it looks like {known[value, byte]})" if (value, byte) in known else ""


def whole_lines(part: Slice, packing: str = "") -> Iterator[bytes]:
    """Whole lines, a few megabytes at a time, without a byte-order mark."""
    rest, at_start = bytearray(), part.first == 0
    for chunk in _decompressed(part, packing) if packing else _plain(part):
        if at_start:
            chunk, at_start = chunk.removeprefix(BOM), False
        cut = chunk.rfind(b"\n") + 1
        if cut and rest:
            rest += chunk[:cut]
            yield _taken(rest)
        elif cut:
            yield chunk[:cut]
        rest += chunk[cut:]
        _check_length(len(rest), part)
    if rest:
        yield _taken(rest)


def _taken(buffer: bytearray) -> bytes:
    """Take the content out of a buffer, so that a long line is not held twice."""
    content = bytes(buffer)
    buffer.clear()
    return content


def _plain(part: Slice) -> Iterator[bytes]:
    """The lines that begin within the slice, starting after its first line break."""
    with Path(part.path).open("rb") as file:
        if part.first and not _seek_line(file, part):
            return
        while (here := file.tell()) < part.last:
            block = file.read(min(_BLOCK, part.last - here))
            if not block:
                return  # truncated since its size was read
            yield block
        file.seek(part.last - 1)
        ended = file.read(1) == b"\n"
        while not ended and (block := file.readline(_BLOCK)):
            ended = block.endswith(b"\n")
            yield block


def _seek_line(file: IO[bytes], part: Slice) -> bool:
    """Seek to the first line that begins in a slice; there is none within a long line."""
    file.seek(part.first - 1)
    while (here := file.tell()) < part.last:
        block = file.read(min(_BLOCK, part.last - here))
        found = block.find(b"\n")
        if found >= 0:
            file.seek(here + found + 1)
            return here + found + 1 < part.last
        if not block:
            return False
    return False


def _decompressed(part: Slice, packing: str) -> Iterator[bytes]:
    with Path(part.path).open("rb") as file:
        try:
            yield from _gunzip(file) if packing == ".gz" else _unzstd(file, part.path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{part.path} is damaged or truncated: {error}; copy or compress it again"
            ) from error


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as opened:
        yield from iter(lambda: opened.read(_BLOCK), b"")


def _unzstd(file: IO[bytes], name: str) -> Iterator[bytes]:
    zstandard = package("zstandard", name, "zstd")
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj
    frame, begun = reader(), False
    for chunk in iter(lambda: file.read(_PIECE), b""):
        while chunk:
            try:
                plain, begun = frame.decompress(chunk), True
            except (zstandard.ZstdError, MemoryError) as error:
                raise zlib.error(str(error)) from error
            if plain:
                yield plain
            chunk = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, begun = reader(), False
    if begun:
        raise EOFError("the last frame has no end")


def package(module: str, path: str, extra: str) -> Any:
    """Import an optional package, or raise an error that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package {module.partition('.')[0]}; "
            f"install it with: pip install 'nexus-trainer[{extra}]'"
        ) from error
