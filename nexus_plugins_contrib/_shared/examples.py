"""Examples: tokenized records with a mask of the learned tokens, cached in files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nexus_core import DataError
from nexus_plugins._shared.cache import cached, fingerprint, sample
from nexus_plugins_contrib._shared.records import Place, Record, Records

__all__ = [
    "IGNORE",
    "Encoder",
    "Example",
    "Examples",
    "Fault",
    "Tokens",
    "encoded",
    "examples_of",
    "first_held_out",
    "is_held_out",
]

Ids = NDArray[np.int64]
_TOGETHER = 512  # records encoded at once
_LAYOUT = 2  # version of the cached files; raise it when they or the encoders change


IGNORE = -100
"""The label of positions that are not learned."""


@dataclass(frozen=True)
class Tokens:
    """A document or part of one, and the mask of its learned tokens.

    Args:
        ids: `(T,)`.
        learnt: `(T,)` bool; True: the token is learned.
        following: the label of the last token: the one that follows it in another row.
    """

    ids: Ids
    learnt: NDArray[np.bool_]
    following: int = IGNORE

    def cut_off(self, length: int) -> Tokens:
        """The first tokens, as a complete document."""
        return Tokens(self.ids[:length], self.learnt[:length])

    def part(self, first: int, count: int) -> Tokens:
        """Some of the tokens, with the rest in other rows."""
        last, following = first + count, self.following
        if last < len(self.ids):
            following = int(self.ids[last]) if self.learnt[last] else IGNORE
        return Tokens(self.ids[first:last], self.learnt[first:last], following)

    @property
    def labels(self) -> Ids:
        """The label of each position, `(T,)`: the next token, if it is learned."""
        return np.append(np.where(self.learnt[1:], self.ids[1:], IGNORE), self.following)


Example = tuple[Tokens, ...]
"""The content of a row: one sequence, or the two of a preference, the chosen one first."""


@dataclass(frozen=True)
class Fault:
    """Why a record cannot be used: a short reason by which faults are counted, and the full one."""

    kind: str
    what: str


class Encoder(Protocol):
    """Turns records into examples; `key` identifies everything that affects the result."""

    key: str
    sequences: int  # per example

    def encode(self, records: Sequence[Record]) -> list[list[Example] | Fault]:
        """The examples of each record, or why it has none."""


class Examples:
    """The examples of a source, in memory-mapped files.

    Attributes:
        ids: tokens of all sequences, concatenated.
        learnt: mask of the learned ones.
        ends: `(examples, sequences)`, the end of each sequence in `ids`.
        records: `(examples,)`, the index of each example's record in `files`.
        skipped: by kind of fault, the number of skipped records and the first full reason.

    Args:
        folder: a folder written by `encoded`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        facts = json.loads((folder / "facts.json").read_text())
        self.sequences: int = facts["sequences"]
        self.skipped: dict[str, tuple[int, str]] = {
            kind: (count, first) for kind, (count, first) in facts["skipped"].items()
        }
        self.files: list[str] = facts["files"]
        self._open()

    def _open(self) -> None:
        self.ids = _mapped(self.folder / "ids.bin", np.dtype("<i4"))
        self.learnt = _mapped(self.folder / "learnt.bin", np.dtype(np.bool_))
        self.ends = _mapped(self.folder / "ends.bin", np.dtype("<i8")).reshape(-1, self.sequences)
        self.records = _mapped(self.folder / "records.bin", np.dtype("<i8")).reshape(-1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> Example:
        first = 0 if number == 0 else int(self.ends[number - 1, -1])
        edges = [first, *self.ends[number].tolist()]
        return tuple(self.cut(*pair) for pair in pairwise(edges))

    def cut(self, first: int, last: int) -> Tokens:
        """The tokens from one position to another, as a document."""
        return Tokens(self.ids[first:last].astype(np.int64), np.array(self.learnt[first:last]))

    def place(self, number: int) -> Place:
        """The record that an example was made from."""
        file, record = self.records[number].tolist()
        return Place(self.files[file], record)

    @cached_property
    def lengths(self) -> Ids:
        """`(examples,)`, the length of each example's longest sequence."""
        flat = np.diff(self.ends.reshape(-1), prepend=0).reshape(-1, self.sequences)
        longest: Ids = flat.max(axis=1, initial=0)
        return longest

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the examples' content, wherever it is stored; large content is sampled."""
        arrays = (self.ids, self.learnt, self.ends)
        return fingerprint([sample(np.ascontiguousarray(a).view(np.uint8).data) for a in arrays])


def encoded(
    records: Records, encoder: Encoder, cache: Path, *, skips: bool, share: float = 0.0
) -> tuple[Examples, Examples]:
    """The training and held-out examples of all records, encoded on first use.

    Args:
        records: the source.
        encoder: the encoder.
        cache: folder for the files.
        skips: skip and count unusable records.
        share: share of the records to hold out, by a hash of their content.

    Raises:
        DataError: a record cannot be used and is not skipped, or none can be used.
    """
    key = fingerprint("examples", _LAYOUT, records.key, encoder.key, skips, share)
    folder = cached(cache, f"examples-{key}", lambda to: _write(records, encoder, to, skips, share))
    found = Examples(folder / "train"), Examples(folder / "held_out")
    if not len(found[0]):
        first = next((f": {what}" for _, what in found[0].skipped.values()), "")
        raise DataError(f"no usable record{first}")
    return found


def first_held_out(
    records: Records,
    encoder: Encoder,
    cache: Path,
    *,
    skips: bool,
    share: float,
    rows: int,
    length: int | None,
) -> Examples:
    """The first held-out examples of a source, without reading it to its end.

    Args:
        records, encoder, cache, skips, share: as for `encoded`.
        rows: number of rows to fill, if there are enough examples.
        length: tokens per row; None: each example is one row.

    Raises:
        DataError: a record cannot be used.
    """

    def write(folder: Path) -> None:
        filled = 0
        with _Writer(folder, encoder.sequences) as side:
            for place, example in _held_out(records, encoder, skips, share):
                side.add(place, example)
                filled += 1 if length is None else len(example[0].ids)
                if filled >= rows * (length or 1):
                    break

    chosen = (records.key, encoder.key, skips, share, rows, length)
    key = fingerprint("held out", _LAYOUT, *chosen)
    return Examples(cached(cache, f"held-out-{key}", write))


def _held_out(
    records: Records, encoder: Encoder, skips: bool, share: float
) -> Iterator[tuple[Place, Example]]:
    for place, found in examples_of(iter(records), encoder):
        if isinstance(found, Fault):
            if not skips:
                raise DataError(f"{place}: {found.what}")
        elif found and is_held_out(found[0], share):
            yield from ((place, example) for example in found)


def is_held_out(example: Example, share: float) -> bool:
    """Whether a record is held out; copies of a record are on the same side."""
    if not share:
        return False
    digest = blake2b(example[0].ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def examples_of(
    records: Iterator[tuple[Place, Record]], encoder: Encoder
) -> Iterator[tuple[Place, list[Example] | Fault]]:
    """The examples of each record, or why it has none, encoded many at a time."""
    while some := list(islice(records, _TOGETHER)):
        made = encoder.encode([record for _, record in some])
        yield from zip([place for place, _ in some], made, strict=True)


def _write(records: Records, encoder: Encoder, folder: Path, skips: bool, share: float) -> None:
    with ExitStack() as scope:
        sides = [
            scope.enter_context(_Writer(folder / name, encoder.sequences))
            for name in ("train", "held_out")
        ]
        for place, found in examples_of(iter(records), encoder):
            if isinstance(found, Fault):
                if not skips:
                    raise DataError(f"{place}: {found.what}")
                sides[0].skip(place, found)
            elif found:
                side = sides[is_held_out(found[0], share)]
                for example in found:
                    side.add(place, example)


class _Writer:
    """Writes the files of `Examples` one after another."""

    def __init__(self, folder: Path, sequences: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._sequences = folder, sequences
        names = ("ids", "learnt", "ends", "records")
        self._parts = {name: (folder / f"{name}.bin").open("wb") for name in names}
        self._files: dict[str, int] = {}
        self._skipped: dict[str, tuple[int, str]] = {}
        self._end = 0

    def add(self, place: Place, example: Example) -> None:
        ends = []
        for sequence in example:
            self._end += len(sequence.ids)
            ends.append(self._end)
            self._put("ids", sequence.ids.astype("<i4"))
            self._put("learnt", sequence.learnt)
        file = self._files.setdefault(place.file, len(self._files))
        self._put("ends", np.array(ends, "<i8"))
        self._put("records", np.array([file, place.number], "<i8"))

    def skip(self, place: Place, fault: Fault) -> None:
        count, first = self._skipped.get(fault.kind, (0, f"{place}: {fault.what}"))
        self._skipped[fault.kind] = count + 1, first

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self._parts.values():
            part.close()
        facts = {"sequences": self._sequences, "files": [*self._files], "skipped": self._skipped}
        (self._folder / "facts.json").write_text(json.dumps(facts))

    def _put(self, part: str, array: NDArray[Any]) -> None:
        self._parts[part].write(array.tobytes())


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    empty = not path.stat().st_size
    return np.zeros(0, dtype) if empty else np.memmap(path, dtype, "r").view(np.ndarray)
