"""Tokenize text once: in parallel, resumable, with bitwise identical output."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_core.errors import DataError
from nexus_plugins._shared.cache import fingerprint, signature, writing
from nexus_plugins._shared.locks import lock
from nexus_plugins.data_text.binary import TokenWriter, id_type
from nexus_plugins.data_text.formats import Portion, Reading, Slice, is_text, read_slice, slices_of
from nexus_plugins.data_text.index import held_out
from nexus_plugins.data_text.load import load_tokenizer
from nexus_plugins.data_text.record import RECORD, Record
from nexus_plugins.data_text.tokenizer import Tokenizer, loss_of
from nexus_plugins.data_text.workers import Workers

__all__ = ["Job", "Summary", "encode_unit", "prepare", "units_of"]

_UNIT = 4 << 20  # bytes of input per work unit


@dataclass(frozen=True)
class Job:
    """The settings of a preparation, apart from its input and output.

    Args:
        tokenizer: "bytes" or the path of a tokenizer.json.
        eos_token, pad_token: None: the usual ones.
        text_key, one_file_one_document, invalid_utf8, as_text: see `Reading`.
        share: share of documents held out for evaluation.
        deduplicate: keep only the first of identical documents.
    """

    tokenizer: str = "bytes"
    eos_token: str | None = None
    pad_token: str | None = None
    text_key: str = "text"
    one_file_one_document: bool = False
    invalid_utf8: str = "error"
    as_text: bool = False
    share: float = 0.0
    deduplicate: bool = False

    @property
    def reading(self) -> Reading:
        """How documents are read from files."""
        return Reading(self.text_key, self.one_file_one_document, self.invalid_utf8, self.as_text)


@dataclass(frozen=True)
class Summary:
    """The outcome: counts of documents, tokens and bytes of text, and of what was left out.

    The last fields count documents whose text was compared with their decoded ids, those of them
    that differ, bytes of text without an id, and files without a document.
    """

    train_documents: int
    train_tokens: int
    valid_documents: int
    valid_tokens: int
    text_bytes: int
    duplicates: int
    skipped: int
    replaced: int
    empty: int
    compared: int = 0
    altered: int = 0
    lost_bytes: int = 0
    barren: tuple[str, ...] = ()


def units_of(paths: Sequence[Path], reading: Reading) -> list[list[Slice]]:
    """Split the files into work units of similar size; depends only on the files."""
    units: list[list[Slice]] = [[]]
    filled = 0
    for path in paths:
        for part in slices_of(path, reading):
            units[-1].append(part)
            filled += part.size
            if filled >= _UNIT:
                units.append([])
                filled = 0
    return [unit for unit in units if unit]


def prepare(
    paths: Sequence[Path],
    out: Path,
    job: Job,
    workers: int = 1,
    progress: Callable[[int], object] = lambda size: None,
) -> Summary:
    """Write train.bin, val.bin, their indexes and the tokenizer into a folder.

    A killed preparation is completed by the next one; the output depends neither on that nor on the
    number of workers.

    Args:
        paths: text files, in the order in which their documents are written.
        out: the folder.
        job: what to do.
        workers: processes.
        progress: called with the bytes of input processed.

    Raises:
        DataError: a file cannot be used, the disk is full, or the folder holds different data.
    """
    ids = [path for path in paths if not is_text(path, job.as_text)]
    if ids:
        raise DataError(f"{ids[0]} already has ids, not text; train on it directly")
    tokenizer = load_tokenizer(job.tokenizer, job.eos_token, job.pad_token)
    settings = {**asdict(job), "tokenizer": tokenizer.hash, "eos": tokenizer.eos}
    signed = signature(paths)
    mark = fingerprint(settings, signed)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            done = _finished(out, mark)
            if done is None:
                parts = _parts_folder(out, mark)
                units = units_of(paths, job.reading)
                encoded = _encode(units, job, parts, workers, progress)
                done = _Merge(out, job, paths, units).run(encoded)
                if signature(paths) != signed:
                    raise DataError("the input changed while it was read; start again")
                _write(out / "tokenizer.json", tokenizer.to_json().encode())
                record = {"fingerprint": mark, "settings": settings, **done}
                _write(out / RECORD, json.dumps(record, indent=1).encode())
                shutil.rmtree(parts)
    try:
        summary = done["summary"]
        return Summary(**{**summary, "barren": tuple(summary.get("barren", ()))})
    except TypeError as error:
        raise DataError(
            f"{out / RECORD} is damaged ({error}); remove the folder, and prepare it again"
        ) from error


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let only one process at a time write to a folder; others wait for its result."""
    with (out / ".lock").open("w") as file:
        lock(file, wait=True)
        yield


def _finished(out: Path, mark: str) -> dict[str, Any] | None:
    found = Record.beside(out)
    if found is None:
        return None
    if found.fingerprint != mark:
        raise DataError(
            f"{out} already has data prepared from other files or settings; choose another "
            "folder, or remove this one"
        )
    return {"summary": found.summary}


def _parts_folder(out: Path, mark: str) -> Path:
    """The folder of finished work units; those of other inputs are removed."""
    for other in out.glob(".parts-*"):
        if other.name != f".parts-{mark}":
            shutil.rmtree(other)
    parts = out / f".parts-{mark}"
    parts.mkdir(exist_ok=True)
    for leftover in parts.glob("*.tmp"):
        leftover.unlink()
    return parts


def _encode(
    units: Sequence[Sequence[Slice]],
    job: Job,
    parts: Path,
    workers: int,
    progress: Callable[[int], object],
) -> Iterator[Path]:
    """The finished work units in order, including those of a killed preparation."""
    there = _whole_parts(parts)
    tasks = [(number, unit) for number, unit in enumerate(units) if number not in there]
    with Workers(min(workers, len(tasks)), job, parts) as pool:
        made = pool.run(tasks)
        for number, unit in enumerate(units):
            yield there[number] if number in there else next(made)
            progress(sum(part.size for part in unit))


def _whole_parts(parts: Path) -> dict[int, Path]:
    """The finished work units by number; those with a size other than in their name are removed."""
    found = {}
    for path in parts.glob("*.part"):
        number, _, size = path.stem.partition("-")
        if f"{path.stat().st_size}" == size and number.isdecimal():
            found[int(number)] = path
        else:
            path.unlink()
    return found


def encode_unit(number: int, unit: Sequence[Slice], job: Job, parts: Path) -> Path:
    """Read and encode one work unit into a separate file; runs in a worker."""
    tokenizer = load_tokenizer(job.tokenizer, job.eos_token, job.pad_token)
    pieces: list[dict[str, NDArray[Any]]] = []
    metadata: list[str | None] = []
    counts = Counter(skipped=0, replaced=0, empty=0, compared=0, altered=0, lost_bytes=0)
    totals = [0] * len(unit)
    for place, part in enumerate(unit):
        for portion in read_slice(part, job.reading):
            pieces.append(_columns(portion, tokenizer, job, counts))
            metadata += portion.metadata
            totals[place] += len(portion.texts) + portion.skipped + portion.empty
            counts.update(skipped=portion.skipped, replaced=portion.replaced, empty=portion.empty)
            pieces[-1]["slices"] = np.full(len(portion.texts), place)
    extra: dict[str, Any] = {"counts": dict(counts), "totals": totals, "metadata": None}
    if any(entry is not None for entry in metadata):
        extra["metadata"] = ["null" if entry is None else entry for entry in metadata]
    return _save_part(parts, number, pieces, extra)


def _columns(
    portion: Portion, tokenizer: Tokenizer, job: Job, counts: Counter[str]
) -> dict[str, NDArray[Any]]:
    """Documents as arrays: `ids` (and `token_bytes`) concatenated, the rest with one entry each."""
    texts = portion.texts
    encoded = tokenizer.encode_documents(texts)
    counts.update(**loss_of(tokenizer, texts, encoded))
    columns = {
        "ids": encoded.ids.astype(id_type(tokenizer.size), copy=False),
        "lengths": encoded.lengths,
        "sizes": np.fromiter(map(len, texts), np.int64, len(texts)),
        "checksums": np.fromiter(map(zlib.crc32, texts), np.int64, len(texts)),
        "numbers": np.array(portion.numbers, np.int64),
    }
    if encoded.token_bytes is not None:
        columns["token_bytes"] = encoded.token_bytes.astype("<u4")
    if job.deduplicate:
        digests = [hashlib.blake2b(text, digest_size=16).digest() for text in texts]
        columns["digests"] = np.array(digests, "V16")
    return columns


def _save_part(
    parts: Path, number: int, pieces: list[dict[str, NDArray[Any]]], extra: dict[str, Any]
) -> Path:
    """Write a line of JSON, followed by the raw columns."""
    columns = {
        name: (array.dtype.str, sum(len(piece[name]) for piece in pieces))
        for name, array in (pieces[0] if pieces else {}).items()
    }
    temporary = parts / f"{number:08d}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        file.write(json.dumps({"columns": columns, **extra}).encode() + b"\n")
        for name in columns:
            for piece in pieces:
                file.write(np.ascontiguousarray(piece[name]).view(np.uint8).data)
        size = file.tell()
    return temporary.rename(parts / f"{number:08d}-{size}.part")


@dataclass
class _Part:
    """A finished work unit: see `_columns`; `totals` counts all documents of each slice."""

    arrays: dict[str, NDArray[Any]]
    metadata: list[str] | None
    totals: list[int]
    counts: dict[str, int]

    @classmethod
    def load(cls, path: Path) -> _Part:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            arrays = {
                name: np.fromfile(file, dtype, count)
                for name, (dtype, count) in head["columns"].items()
            }
        return cls(arrays, head["metadata"], head["totals"], head["counts"])


class _Merge:
    """Merges the work units in order: origins, duplicates, the split."""

    def __init__(
        self, out: Path, job: Job, paths: Sequence[Path], units: Sequence[Sequence[Slice]]
    ) -> None:
        self._out = out
        self._job = job
        self._units = units
        self._documents = {str(path): 0 for path in paths}
        self._kept = dict(self._documents)
        self._before = 0  # documents of all files so far
        self._seen: set[bytes] = set()
        self._counts: Counter[str] = Counter(duplicates=0, skipped=0, replaced=0, empty=0)
        self._barren: list[str] = []
        tokenizer = load_tokenizer(job.tokenizer, job.eos_token, job.pad_token)
        self._writers = [
            TokenWriter(out / name, tokenizer.size, tokenizer.hash, tokenizer.token_bytes is None)
            for name in (("train", "val") if job.share else ("train",))
        ]

    def run(self, parts: Iterator[Path]) -> dict[str, Any]:
        """Write everything, and return the summary for the record."""
        try:
            for unit, path in zip(self._units, parts, strict=True):
                self._take(unit, _Part.load(path))
            self._check()
            headers = [writer.finish() for writer in self._writers]
        finally:
            for writer in self._writers:
                writer.abandon()
        train, valid = headers[0], headers[1] if self._job.share else None
        summary = Summary(
            train.documents,
            train.tokens,
            valid.documents if valid else 0,
            valid.tokens if valid else 0,
            sum(header.text_bytes for header in headers),
            barren=tuple(self._barren),
            **self._counts,
        )
        return {
            "files": list(self._documents.items()),
            "summary": asdict(summary),
            "checksums": {
                f"{name}.bin": writer.checksum
                for name, writer in zip(("train", "val"), self._writers, strict=False)
            },
        }

    def _take(self, unit: Sequence[Slice], part: _Part) -> None:
        self._counts.update(part.counts)
        before = []
        for piece, total in zip(unit, part.totals, strict=True):
            before.append(self._before)
            self._before += total
            self._documents[piece.path] += total
        if not part.arrays:
            return
        arrays = part.arrays
        for place, kept in enumerate(np.bincount(arrays["slices"], minlength=len(unit)).tolist()):
            self._kept[unit[place].path] += kept
        arrays["origins"] = np.array(before, np.int64)[arrays["slices"]] + arrays["numbers"]
        fresh = self._fresh(arrays)
        valid = held_out(arrays["checksums"], self._job.share)
        for writer, chosen in zip(self._writers, (fresh & ~valid, fresh & valid), strict=False):
            _append(writer, part, chosen)

    def _fresh(self, arrays: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """The mask of documents that have not occurred before."""
        fresh = np.ones(len(arrays["lengths"]), np.bool_)
        if self._job.deduplicate:
            for number, digest in enumerate(arrays["digests"].tolist()):
                fresh[number] = digest not in self._seen
                self._seen.add(digest)
        self._counts["duplicates"] += int((~fresh).sum())
        return fresh

    def _check(self) -> None:
        self._barren = [path for path, kept in self._kept.items() if not kept]
        if len(self._barren) == len(self._kept):
            raise DataError(f"{self._barren[0]} has no usable document; remove it")
        if not self._writers[0].documents:
            raise DataError(
                "no document is left to train on; lower the evaluation share (--val, "
                "data_text.valid_share) or add documents"
            )


def _append(writer: TokenWriter, part: _Part, chosen: NDArray[np.bool_]) -> None:
    arrays, metadata = part.arrays, part.metadata
    token_bytes = arrays.get("token_bytes")
    ids = arrays["ids"]
    if not chosen.all():
        tokens = np.repeat(chosen, arrays["lengths"])
        ids = ids[tokens]
        token_bytes = None if token_bytes is None else token_bytes[tokens]
        metadata = metadata and list(compress(metadata, chosen.tolist()))
    writer.append(
        ids,
        arrays["lengths"][chosen],
        arrays["origins"][chosen],
        int(arrays["sizes"][chosen].sum()),
        metadata,
        token_bytes,
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
