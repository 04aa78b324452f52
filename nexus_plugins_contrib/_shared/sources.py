"""Records of data sets: from a folder, files, or the hub, one after another or as a stream."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from nexus_core import ConfigError, DataError
from nexus_plugins._shared.cache import fingerprint, signature
from nexus_plugins._shared.paths import expanded, reason

try:
    import datasets
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
except ImportError as error:
    raise ConfigError(
        "this plugin needs the package datasets: pip install 'nexus-trainer[hf]'"
    ) from error

__all__ = ["Place", "Record", "Records", "Wish", "open_records", "open_stream"]

Record: TypeAlias = dict[str, Any]
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".arrow": "arrow"}
_LINES = (".jsonl", ".ndjson")
_KNOWN = (*_LINES, ".json", *_BUILDERS)


@dataclass(frozen=True)
class Place:
    """Where a record comes from: its file or data set, and its number there, from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.number:,}"


@dataclass(frozen=True)
class Wish:
    """What to open.

    Args:
        path: a folder, a file, a glob, or the id of a data set on the hub.
        split, subset, revision: of a data set that has several; None: its own default.
        key: of the setting, for messages.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    key: str = "train"


class Records(Protocol):
    """Records that can be read again, one after another, from any place.

    `key` tells what they are, so that what was made of them is made once; `content` does so
    wherever they lie, and copies have the same.
    """

    key: str
    content: str

    def __iter__(self) -> Iterator[tuple[Place, Record]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class JsonLines:
    """Objects of JSON, one a line; `state_dict` is the place behind the one read last.

    They are read as they are written: no key is added, none is merged with those of other lines.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        known = signature(paths)
        self.key = fingerprint("lines", known)
        self.content = fingerprint("lines", _contents(known))
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
    """A data set of `datasets`, map-style or streaming.

    Arrow gives every record of a column the keys of all of them; those without a value are taken
    away again, within lists and objects. A stream is opened anew for each pass: one that has been
    told its place begins every later pass there.

    Args:
        make: opens the data set.
        name: what it was opened by.
        key: what tells it from others.
        content: the same wherever it lies; None: the key.
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


def open_records(wish: Wish) -> Records:
    """The records of a data set on this machine, or of the hub.

    Raises:
        DataError: it cannot be found or read.
    """
    return _opened(wish, streaming=False)


def open_stream(wish: Wish) -> Records:
    """The same as a stream, which reads no more than it gives.

    Raises:
        DataError: it cannot be found or read.
    """
    return _opened(wish, streaming=True)


def _opened(wish: Wish, streaming: bool) -> Records:
    folder = expanded(wish.path)
    saved = folder.is_dir() and any(
        (folder / name).exists() for name in ("dataset_dict.json", "state.json")
    )
    files = [] if saved else _files(folder, wish)
    if files and all(path.suffix in _LINES for path in files):
        return JsonLines(files)
    try:
        if saved:
            return _of_saved(folder, wish, streaming)
        if files:
            return _of_files(files, streaming)
        _check_id(wish.path)
        return _of_hub(wish, streaming)
    except DataError:
        raise
    except Exception as error:  # the package raises exceptions of many kinds
        said = " ".join(reason(error).split())[:300]
        raise DataError(
            f"cannot open the data '{wish.path}': {type(error).__name__}: {said}; expected a "
            f"folder or file of {', '.join(_KNOWN)}, a data set saved by save_to_disk, or the id "
            "of one on the hub (offline: in its cache)"
        ) from error


def _files(path: Path, wish: Wish) -> list[Path]:
    """The files that a path names; none where it is no path."""
    if path.is_file():
        if path.suffix not in _KNOWN:
            raise DataError(
                f"{path} has the unknown suffix '{path.suffix}'; expected one of "
                f"{', '.join(_KNOWN)}"
            )
        return [path]
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.suffix in _KNOWN and p.is_file()]
        found = [p for p in found if not any(part.startswith(".") for part in p.parts)]
        of_split = [p for p in found if wish.split in p.stem.replace("-", "_").split("_")]
        if not found:
            raise DataError(f"{path} holds no data set, and no file of {', '.join(_KNOWN)}")
        return _of_one_kind(of_split or found, path)
    if not any(letter in str(path) for letter in "*?["):
        return []
    matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    return _of_one_kind([p for p in matches if p.suffix in _KNOWN], path)


def _of_one_kind(files: list[Path], where: Path) -> list[Path]:
    kinds = {path.suffix for path in files} - set(_LINES)
    if len(kinds) > 1 or (kinds and len({path.suffix for path in files}) > 1):
        raise DataError(
            f"{where} holds files of several kinds ({', '.join(sorted({p.suffix for p in files}))})"
            f"; name those of one kind, such as {where}/*{sorted(kinds)[0]}"
        )
    return files


def _of_saved(folder: Path, wish: Wish, streaming: bool) -> Table:
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if wish.split not in found:
            raise DataError(
                f"the data set {folder} has no split '{wish.split}'; it has {', '.join(found)}"
            )
        found = found[wish.split]
    key = fingerprint("saved", found._fingerprint, len(found))
    return Table(found.to_iterable_dataset if streaming else lambda: found, str(folder), key)


def _of_files(files: list[Path], streaming: bool) -> Table:
    suffix, names = files[0].suffix, [str(path) for path in files]
    builder = "json" if suffix == ".json" else _BUILDERS[suffix]
    options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
    load = partial(datasets.load_dataset, builder, data_files=names, split="train", **options)
    name = names[0] if len(names) == 1 else os.path.commonpath(names)
    known = signature(files)
    keys = fingerprint("files", builder, known), fingerprint("files", builder, _contents(known))
    return _table(partial(load, streaming=streaming), streaming, name, *keys)


def _contents(signatures: list[list[str | int]]) -> list[list[str | int]]:
    """Of files' signatures what copies have too: the size, and a look at the bytes."""
    return [[size, looks] for _, size, _, looks in signatures]


def _check_id(text: str) -> None:
    """Make sure that what is no file may be an id, before the hub is asked for it.

    Raises:
        DataError: it cannot be one.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) or text.endswith(_KNOWN):
        raise DataError(
            f"there is no file or folder '{text}', and no data set of the hub has such an id; "
            f"expected a folder or file of {', '.join(_KNOWN)}, a data set saved by save_to_disk, "
            "or an id such as org/name"
        )


def _of_hub(wish: Wish, streaming: bool) -> Table:
    load = partial(
        datasets.load_dataset,
        _snapshot(wish) or wish.path,
        wish.subset,
        split=wish.split,
        revision=wish.revision,
        streaming=streaming,
    )
    key = fingerprint("hub", wish.path, wish.subset, wish.split, wish.revision)
    return _table(load, streaming, wish.path, key, key)


def _snapshot(wish: Wish) -> str | None:
    """Offline, the data set's folder in the hub's cache, where `datasets` does not look."""
    if not constants.HF_HUB_OFFLINE:
        return None
    try:
        found = snapshot_download(
            wish.path, repo_type="dataset", revision=wish.revision, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return str(found)


def _table(load: Callable[[], Any], streaming: bool, name: str, key: str, content: str) -> Table:
    """The table, after it was opened once, so that what is wrong is said at the start."""
    found = load()
    own = fingerprint(key, getattr(found, "_fingerprint", None))
    return Table(load, name, key, content) if streaming else Table(lambda: found, name, own)


def _object(line: bytes, place: Place) -> Record:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{place}: expected an object of JSON, got {type(found).__name__}")
    return cast(Record, found)


def _present(value: Any) -> Any:
    """A value without the keys that Arrow has filled in."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
