"""Files of text and the documents in them: .txt, .jsonl (also .gz and .zst) and .parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from nexus_core.errors import DataError

__all__ = [
    "BOM",
    "HELD_OUT",
    "SUFFIXES",
    "TRAIN",
    "Portion",
    "Reading",
    "Slice",
    "find_files",
    "is_text",
    "is_utf8",
    "read_slice",
    "slices_of",
    "suffix_of",
    "whole",
    "whole_lines",
]

_BLOCK = 4 << 20  # bytes read at a time
_PIECE = 1 << 15  # bytes checked at a time
_SLICE = 4 << 20  # bytes of a file that are one piece of work
BOM = b"\xef\xbb\xbf"
TRAIN, HELD_OUT = "train.bin", "val.bin"  # of prepared data
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".bin")


@dataclass(frozen=True)
class Reading:
    """How documents are taken out of files.

    Args:
        text_key: key or column of the text in .jsonl and .parquet.
        one_file_one_document: take a .txt file as one document instead of one a line.
        invalid_utf8: "error", "replace" (by U+FFFD) or "skip" (the document).
    """

    text_key: str = "text"
    one_file_one_document: bool = False
    invalid_utf8: str = "error"


@dataclass(frozen=True)
class Slice:
    """A part of a file that can be read without the rest.

    Args:
        path: the file.
        first, last: bytes of a .txt or .jsonl file (the lines that begin there), row groups of
            .parquet; a compressed file has one slice.
        size: bytes of the file, about.
    """

    path: str
    first: int
    last: int
    size: int


@dataclass
class Portion:
    """Some documents of a slice, in order.

    Args:
        texts: valid UTF-8, none empty.
        numbers: of each document among all of the slice, those left out included.
        metadata: JSON of each document's `metadata`, where any has one.
        skipped: documents left out because they are not UTF-8.
        replaced: documents in which bytes were replaced.
        empty: documents left out because there is no text in them (blank lines do not count).
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
        """Take in a document, by the policy for bytes that are not UTF-8."""
        try:
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
        self.metadata.append(None if metadata is None else json.dumps(metadata, default=str))


def suffix_of(path: Path) -> str:
    """The suffix that decides the format, `.jsonl.gz` as a whole; "" for an unknown one."""
    name = path.name.lower()
    return next((known for known in SUFFIXES[::-1] if name.endswith(known)), "")


def is_text(path: Path) -> bool:
    """Whether the file holds text, not ids."""
    return suffix_of(path) != ".bin"


def find_files(wish: str) -> list[Path]:
    """The files that a path, a folder or a glob stands for, sorted.

    Of a folder, all files of known formats in it and below; files and folders that begin with a
    dot are left out. A folder with train.bin is prepared data, and stands for train.bin and val.bin
    alone. Metadata beside ids is no text.

    Raises:
        DataError: no file is found, or one is of an unknown format.
    """
    path = Path(wish).expanduser()
    if path.is_dir():
        found = [one for one in _below(path) if not _is_metadata(one)]
        what = f"the folder {path} holds no file that can be read"
    elif path.exists():
        found, what = [path], ""
    else:
        anchor = Path(path.anchor)
        pattern = str(path.relative_to(anchor)) if path.anchor else str(path)
        matching = anchor.glob(pattern) if any(mark in wish for mark in "*?[") else ()
        found = [one for one in matching if not _is_metadata(one)]
        what = f"there is no file or folder '{wish}'"
    files = sorted(one for one in found if one.is_file())
    if not files:
        raise DataError(f"{what}; expected {', '.join(SUFFIXES)} (from {Path.cwd()})")
    for one in files:
        if not suffix_of(one):
            raise DataError(
                f"{one} is of an unknown format '{one.suffix}'; known: {', '.join(SUFFIXES)}"
            )
    return files


def _below(folder: Path) -> list[Path]:
    """The files of known formats; where data was prepared, not what else lies there."""
    found = [one for one in folder.rglob("*") if suffix_of(one) and not _hidden(one, folder)]
    prepared = {one.parent for one in found if one.name == TRAIN}
    ids = {folder / name for folder in prepared for name in (TRAIN, HELD_OUT)}
    return [one for one in found if one in ids or prepared.isdisjoint(one.parents)]


def _is_metadata(path: Path) -> bool:
    """Whether it is NAME.meta.jsonl beside NAME.bin."""
    name = path.name.removesuffix(".meta.jsonl")
    return name != path.name and path.with_name(f"{name}.bin").exists()


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def slices_of(path: Path) -> list[Slice]:
    """Cut a file into slices; where, depends on the file alone."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if size == 0:
        raise DataError(f"{path} is empty; leave it out, or put text into it")
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet_slices(path)
    step = _SLICE if suffix in (".txt", ".jsonl") else size
    edges = [*range(0, size, step), size]
    return [Slice(str(path), *pair, pair[1] - pair[0]) for pair in pairwise(edges)]


def whole(path: Path) -> Slice:
    """The slice that is all of a file of bytes."""
    size = path.stat().st_size
    return Slice(str(path), 0, size, size)


def read_slice(part: Slice, reading: Reading) -> Iterator[Portion]:
    """The documents of a slice, a few megabytes at a time.

    Raises:
        DataError: the file cannot be read, or a document in it cannot be used.
    """
    path = Path(part.path)
    suffix = suffix_of(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(part, reading)
        elif suffix == ".txt" and reading.one_file_one_document:
            portion = Portion()
            raw = path.read_bytes().removeprefix(BOM)
            portion.add(0, raw, reading.invalid_utf8, lambda: str(path))
            yield portion
        else:
            take = _take_lines if suffix == ".txt" else _take_json
            yield from _read_lines(part, suffix, reading, take)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


_Take = Callable[[bytes, Reading, int, Callable[[int], str]], Portion]


def _read_lines(part: Slice, suffix: str, reading: Reading, take: _Take) -> Iterator[Portion]:
    line, number = 0, 0
    for block in whole_lines(part, suffix):
        portion = take(block, reading, number, _namer(part, line))
        yield portion
        line += block.count(b"\n")
        number += len(portion.texts) + portion.skipped + portion.empty


def _namer(part: Slice, line: int) -> Callable[[int], str]:
    """Names a line of a block for an error; counts the lines before the slice only then."""

    def name(offset: int) -> str:
        before = 0
        if part.first:
            with Path(part.path).open("rb") as file:
                blocks = iter(lambda: file.read(min(_BLOCK, part.first - file.tell())), b"")
                before = sum(block.count(b"\n") for block in blocks)
                file.seek(part.first - 1)
                before += file.read(1) != b"\n"  # the line that began before belongs to others
        return f"{part.path}, line {before + line + offset + 1}"

    return name


def _take_lines(
    block: bytes, reading: Reading, number: int, where: Callable[[int], str]
) -> Portion:
    """One document a line; blank lines are none."""
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


def _take_json(block: bytes, reading: Reading, number: int, where: Callable[[int], str]) -> Portion:
    """One JSON object a line, its text under a key."""
    portion = Portion()
    policy = reading.invalid_utf8
    for offset, line in enumerate(block.split(b"\n")):
        if not line or line.isspace():
            continue
        try:
            entry = json.loads(line.decode(errors="strict" if policy == "error" else "replace"))
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(where(offset), line[error.start], error.start)) from None
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where(offset)} is not JSON ({error}); expected one object a line, such as "
                f'{{"{reading.text_key}": "..."}}'
            ) from None
        text = _text_of(entry, reading.text_key, lambda at=offset: where(at))  # type: ignore[misc]
        damaged = policy != "error" and not is_utf8(line)
        raw = b"\xff" if damaged and policy == "skip" else text.encode(errors="surrogatepass")
        portion.replaced += damaged and policy == "replace"
        portion.add(number, raw, policy, lambda at=offset: where(at), entry.get("metadata"))  # type: ignore[misc]
        number += 1
    return portion


def _text_of(entry: Any, key: str, where: Callable[[], str]) -> str:
    if not isinstance(entry, dict):
        raise DataError(
            f'{where()} holds {_kind(entry)}; expected an object such as {{"{key}": "..."}}'
        )
    if key not in entry:
        raise DataError(
            f"{where()} has no key '{key}', only {', '.join(map(repr, entry)) or 'none'}; "
            "set data_text.text_key (--text-key) to the key of the text"
        )
    text = entry[key]
    if not isinstance(text, str):
        raise DataError(f"{where()}: '{key}' is {_kind(text)}; expected a string")
    return text


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def is_utf8(raw: bytes) -> bool:
    """Whether bytes are UTF-8; in small pieces, because most of them are ASCII alone."""
    begin = 0
    while begin < len(raw):
        end = begin + _PIECE
        while end < len(raw) and raw[end] & 0xC0 == 0x80:  # not within a letter
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
        f"{where}, byte {byte + 1} (0x{value:02x}) is not UTF-8; convert the file, or set "
        "data_text.invalid_utf8 (--invalid-utf8) to replace or skip"
    )


def whole_lines(part: Slice, suffix: str) -> Iterator[bytes]:
    """Whole lines, a few megabytes at a time, without a byte-order mark."""
    chunks = _decompressed(part, suffix) if suffix.endswith(("gz", "zst")) else _plain(part)
    rest: list[bytes] = []
    at_start = part.first == 0
    for chunk in chunks:
        if at_start:
            chunk, at_start = chunk.removeprefix(BOM), False
        cut = chunk.rfind(b"\n") + 1
        rest.append(chunk[:cut] if cut else chunk)
        if cut:
            yield b"".join(rest)
            rest = [chunk[cut:]]
    if any(rest):
        yield b"".join(rest)


def _plain(part: Slice) -> Iterator[bytes]:
    """The lines that begin within the slice: from the first line break on, up to one behind."""
    with Path(part.path).open("rb") as file:
        if part.first:
            file.seek(part.first - 1)
            file.readline()
        while (here := file.tell()) < part.last:
            yield file.read(min(_BLOCK, part.last - here))
        if part.first < part.last and file.tell() == part.last:
            file.seek(part.last - 1)
            if file.read(1) != b"\n":
                yield file.readline()


def _decompressed(part: Slice, suffix: str) -> Iterator[bytes]:
    with Path(part.path).open("rb") as file:
        try:
            yield from _gunzip(file) if suffix.endswith("gz") else _unzstd(file, part.path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{part.path} is damaged or cut short: {error}; copy or compress it again"
            ) from error


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as opened:
        yield from iter(lambda: opened.read(_BLOCK), b"")


def _unzstd(file: IO[bytes], name: str) -> Iterator[bytes]:
    zstandard = _package("zstandard", name, "zstd")
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    for chunk in iter(lambda: file.read(_BLOCK // 8), b""):
        while chunk:
            try:
                plain, begun = frame.decompress(chunk), True
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from error
            if plain:
                yield plain
            chunk = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    if begun:
        raise EOFError("the last frame has no end")


def _package(module: str, path: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package {module.partition('.')[0]}; "
            f"install it with: pip install 'nexus-trainer[{extra}]'"
        ) from error


def _parquet_slices(path: Path) -> list[Slice]:
    with _parquet(str(path)) as file:
        groups = file.metadata.num_row_groups
    size = path.stat().st_size // max(1, groups)
    return [Slice(str(path), group, group + 1, size) for group in range(groups)]


def _parquet(path: str) -> Any:
    arrow = _package("pyarrow", path, "parquet")
    parquet = _package("pyarrow.parquet", path, "parquet")
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable .parquet file: {error}") from error


def _read_parquet(part: Slice, reading: Reading) -> Iterator[Portion]:
    arrow = _package("pyarrow", part.path, "parquet")
    with _parquet(part.path) as file:
        columns = _parquet_columns(file.schema_arrow, part.path, reading.text_key)
        before = sum(file.metadata.row_group(group).num_rows for group in range(part.first))
        number = 0
        try:
            for rows in file.iter_batches(
                4096, row_groups=list(range(part.first, part.last)), columns=columns
            ):
                yield _take_rows(rows, reading, number, before, part.path)
                number += rows.num_rows
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{part.path} is damaged: {error}; write it again") from error


def _parquet_columns(schema: Any, path: str, key: str) -> list[str]:
    if key not in schema.names:
        raise DataError(
            f"{path} has no column '{key}', only {', '.join(map(repr, schema.names))}; set "
            "data_text.text_key (--text-key) to the column of the text"
        )
    kind = str(schema.field(key).type)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"{path}: column '{key}' is of type {kind}; expected strings")
    return [key, "metadata"] if "metadata" in schema.names else [key]


def _take_rows(rows: Any, reading: Reading, number: int, before: int, path: str) -> Portion:
    portion = Portion()
    texts = rows.column(reading.text_key).cast("large_binary").to_pylist()
    metadata: Iterable[Any] = (
        rows.column("metadata").to_pylist()
        if "metadata" in rows.schema.names
        else [None] * len(texts)
    )
    for offset, (raw, extra) in enumerate(zip(texts, metadata, strict=True)):
        where = f"{path}, row {before + number + offset + 1}"
        if raw is None:
            raise DataError(f"{where}: '{reading.text_key}' is null; expected a string")
        portion.add(number + offset, raw, reading.invalid_utf8, lambda at=where: at, extra)  # type: ignore[misc]
    return portion
