"""Open datasets: a folder, files, or a Hub id, map-style or streaming."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nexus_core import ConfigError, DataError
from nexus_plugins._shared.cache import fingerprint, signature
from nexus_plugins._shared.paths import expanded, reason
from nexus_plugins_contrib._shared.records import JsonLines, Records, Table, contents

try:
    import datasets
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
except ImportError as error:
    raise ConfigError(
        "this plugin needs the package datasets: pip install 'nexus-trainer[hf]'"
    ) from error

__all__ = ["Wish", "open_records", "open_stream"]

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".arrow": "arrow"}
_LINES = (".jsonl", ".ndjson")
_KNOWN = (*_LINES, ".json", *_BUILDERS)


@dataclass(frozen=True)
class Wish:
    """What to open.

    Args:
        path: a folder, file, glob, or id of a data set on the Hub.
        split, subset, revision: which to use of a data set with several; None: its default.
        key: key of the setting, for messages.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    key: str = "train"


def open_records(wish: Wish) -> Records:
    """The records of a data set on this machine or the Hub.

    Raises:
        DataError: it cannot be found or read.
    """
    return _opened(wish, streaming=False)


def open_stream(wish: Wish) -> Records:
    """The same as a stream, which reads only what is requested.

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
    """The files at a path; empty if it is not a path."""
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
            raise DataError(f"{path} has no data set and no {', '.join(_KNOWN)} file")
        return _of_one_kind(of_split or found, path)
    if not any(letter in str(path) for letter in "*?["):
        return []
    matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    return _of_one_kind([p for p in matches if p.suffix in _KNOWN], path)


def _of_one_kind(files: list[Path], where: Path) -> list[Path]:
    kinds = {path.suffix for path in files} - set(_LINES)
    if len(kinds) > 1 or (kinds and len({path.suffix for path in files}) > 1):
        raise DataError(
            f"{where} has files of several kinds ({', '.join(sorted({p.suffix for p in files}))})"
            f"; choose one kind, such as {where}/*{sorted(kinds)[0]}"
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
    keys = fingerprint("files", builder, known), fingerprint("files", builder, contents(known))
    return _table(partial(load, streaming=streaming), streaming, name, *keys)


def _check_id(text: str) -> None:
    """Check that the name is a valid id before asking the Hub for it.

    Raises:
        DataError: it is not.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) or text.endswith(_KNOWN):
        raise DataError(
            f"no file or folder '{text}', and no data set with this id on the hub; "
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
    """Offline, the data set's folder in the Hub cache, where `datasets` does not look."""
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
    """The table, opened once now so that errors occur at the start."""
    found = load()
    own = fingerprint(key, getattr(found, "_fingerprint", None))
    return Table(load, name, key, content) if streaming else Table(lambda: found, name, own)
