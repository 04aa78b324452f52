"""Dataset records that can be re-read from any position."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from nexus_core import DataError
from nexus_plugins._shared.cache import fingerprint, signature

__all__ = ["JsonLines", "Place", "Record", "Records", "Table", "contents"]

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """The origin of a record: its file or data set, and its number there, from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.number:,}"


class Records(Protocol):
    """Records that can be re-read from any position.

    `key` identifies them, for caches of derived data; `content` does so independent of their
    location, so copies have the same.
    """

    key: str
    content: str

    def __iter__(self) -> Iterator[tuple[Place, Record]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class JsonLines:
    """JSON objects, one per line; `state_dict` is the position after the last one read.

    They are read as written: no keys are added or merged between lines.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        known = signature(paths)
        self.key = fingerprint("lines", known)
        self.content = fingerprint("lines", contents(known))
        self._paths = tuple(paths)
        self._file = self._offset = self._number = 0

    def __iter__(self) -> Iterator[tuple[Place, Record]]:
        while self._file < len(self._paths):
            path = self._paths[self._file]
            with path.open("rb") as file:
                file.seek(self._offset)
                while line := file.readline():
                    self._offset, self._number = self._offset + len(line), self._number + 1
                    if line.strip():
                        place = Place(str(path), self._number)
                        yield place, _object(line, place)
            self._file, self._offset, self._number = self._file + 1, 0, 0
        self._file = 0

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "offset": self._offset, "number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._file, self._offset = state["file"], state["offset"]
        self._number = state["number"]


class Table:
    """A dataset of the package `datasets`, map-style or streaming.

    Arrow gives every record of a column the keys of all records; those without a value are removed
    again, also within lists and objects. A stream is reopened for each pass, because one whose
    position was restored starts every later pass there.

    Args:
        make: opens the data set.
        name: the name it was opened by.
        key: identifies it.
        content: identifies it independent of its location; None: the key.
    """

    def __init__(
        self, make: Callable[[], Any], name: str, key: str, content: str | None = None
    ) -> None:
        self.key, self.content = key, content or key
        self._make, self._name = make, name
        self._inner: Any = None
        self._begin: dict[str, Any] | None = None
        self._number = 0

    def __iter__(self) -> Iterator[tuple[Place, Record]]:
        self._inner = self._make()
        if self._begin is not None:
            self._inner.load_state_dict(self._begin)
        for record in self._inner:
            self._number += 1
            yield Place(self._name, self._number), {k: _present(v) for k, v in record.items()}
        self._inner, self._begin, self._number = None, None, 0

    def state_dict(self) -> dict[str, Any]:
        inner = self._begin if self._inner is None else self._inner.state_dict()
        return {"number": self._number, "inner": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner, self._begin, self._number = None, state["inner"], state["number"]


def contents(signatures: list[list[str | int]]) -> list[list[str | int]]:
    """The part of file signatures that copies share: size and sampled bytes."""
    return [[size, looks] for _, size, _, looks in signatures]


def _object(line: bytes, place: Place) -> Record:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(found).__name__}")
    return cast(Record, found)


def _present(value: Any) -> Any:
    """A value without the keys that Arrow filled in."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
