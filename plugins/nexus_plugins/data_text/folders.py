"""Resolve a path, a folder or a glob to files; what is left out is counted and named."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_core.errors import DataError, suggestion
from nexus_plugins._shared.cache import CACHE_TAG
from nexus_plugins._shared.paths import expanded, printable, reason
from nexus_plugins.data_text.formats import KNOWN, format_of, suffix_of

__all__ = ["HELD_OUT", "TRAIN", "Found", "find", "root_of"]

TRAIN, HELD_OUT = "train.bin", "val.bin"  # files of prepared data
_ALONE = {".json"}  # skipped in folders, as usually settings
_BESIDE_IDS = (".idx", ".len", ".meta.jsonl")
_OF_A_RUN = {"config.yaml", "checkpoints"}
_OF_IDS = {"tokenizer.json", "meta.pkl", "prepare.json"}
_HEAD = 8192  # bytes read to detect text
_NAMED = 3  # files named in a note


@dataclass(frozen=True)
class Found:
    """The files that a path resolves to.

    Args:
        files: sorted by name.
        named: whether it is a single file given explicitly, not found through a folder or a glob.
        left_out: what is skipped, in words with counts.
    """

    files: tuple[Path, ...]
    named: bool = False
    left_out: tuple[str, ...] = ()


def find(wish: str, as_text: bool = False) -> Found:
    """The files that a path, a folder or a glob resolves to.

    A folder stands for all files of known formats in and below it, following links and skipping
    names that begin with a dot, caches and run folders. A file that is named may have any suffix if
    it holds text. A folder with train.bin is prepared data and stands for train.bin and val.bin
    only. Metadata next to ids is not text.

    Args:
        wish: the path; `~` and environment variables are expanded.
        as_text: read every text file, whatever its suffix.

    Raises:
        DataError: no file is found, one is of an unknown format, or something cannot be read.
    """
    if not wish:
        raise DataError("the path of the data is empty; expected a file, a folder or a glob")
    path = expanded(wish)
    try:
        if path.is_dir():
            return _Choice("the folder", wish, as_text).of(_below(path, set()))
        if path.exists():
            return Found((_named(path, as_text),), named=True)
        if any(mark in wish for mark in "*?[") and (matching := list(_matching(str(path)))):
            return _Choice("the pattern", wish, as_text).of(iter(matching))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {reason(error)}") from error
    beside = [file.name for file in path.parent.glob("*")]
    raise DataError(f"no file or folder '{wish}' in {Path.cwd()}.{suggestion(path.name, beside)}")


def root_of(path: Path) -> Path:
    """The folder that a folder or a glob is rooted at."""
    marked = [place for place in (path, *path.parents) if any(mark in place.name for mark in "*?[")]
    return path if path.exists() or not marked else marked[-1].parent


def _named(path: Path, as_text: bool) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder; write its content to a file")
    if not (suffix_of(path, as_text) or _holds_text(path)):
        raise DataError(
            f"{path} is not text, and its format '{path.suffix}' is unknown; known: {KNOWN}"
        )
    return path


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """All files in and below a folder that are not hidden; linked folders are visited once."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"cannot read the folder {folder}: {reason(error)}; make it readable, or name the "
            "other files and folders"
        ) from error
    names = {entry.name for entry in entries}
    if CACHE_TAG in names or names >= _OF_A_RUN:
        return
    for entry in sorted(entries, key=lambda one: (one.is_symlink(), one.name)):
        path = folder / entry.name
        if path.is_dir():
            yield from _below(path, seen)
        else:
            yield path


def _matching(pattern: str) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for name in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207 - it follows links
        path = Path(name)
        if not path.is_dir():
            yield path
        elif "**" not in pattern:
            yield from _below(path, seen)


class _Choice:
    """Selects which files of a folder or a glob to read.

    Args:
        what: the kind of the wish, for errors.
        wish: where the files come from.
        as_text: read every text file.
    """

    def __init__(self, what: str, wish: str, as_text: bool) -> None:
        self._what, self._wish = f"{what} '{wish}'", wish
        self._as_text = as_text
        self._left_out: dict[str, list[Path]] = {}

    def of(self, files: Iterator[Path]) -> Found:
        """The files to read, sorted."""
        there = self._once([path for path in files if self._is_whole(path)])
        known = [path for path in there if self._is_known(path)]
        kept = [path for path in self._of_prepared(known) if not self._is_empty(path)]
        if not kept:
            found = "; ".join(self._notes()) or "it is empty, a run or a cache"
            raise DataError(f"{self._what} has no readable file: {found}; expected {KNOWN}")
        return Found(tuple(sorted(kept)), left_out=tuple(self._notes()))

    def _leave(self, why: str, path: Path) -> bool:
        self._left_out.setdefault(why, []).append(path)
        return False

    def _is_whole(self, path: Path) -> bool:
        if path.is_file():
            return True
        broken = path.is_symlink() and not path.exists()
        return self._leave("broken links" if broken else "not regular files", path)

    def _once(self, files: Sequence[Path]) -> list[Path]:
        """Each file once, under its own name if links point to it too."""
        real = {path: os.path.realpath(path) for path in files}
        kept: dict[str, Path] = {}
        for path in sorted(real, key=lambda path: (real[path] != str(path.absolute()), path)):
            if real[path] not in kept:
                kept[real[path]] = path
            elif path.is_symlink():
                self._leave("links to files that are read", path)
        return list(kept.values())

    def _is_known(self, path: Path) -> bool:
        if self._as_text:
            return _holds_text(path) or self._leave("not text", path)
        suffix = suffix_of(path)
        if suffix and suffix not in _ALONE:
            return not _is_metadata(path)
        if not _goes_with_ids(path):
            self._leave("of formats that are not read from folders", path)
        return False

    def _of_prepared(self, files: list[Path]) -> list[Path]:
        """The files, except those that belong to prepared data."""
        if self._as_text:
            return files
        prepared = {path.parent for path in files if path.name == TRAIN}
        kept = []
        for path in files:
            beside = path.parent in prepared and path.name in (TRAIN, HELD_OUT)
            if beside or prepared.isdisjoint(path.parents):
                kept.append(path)
            else:
                self._leave("beside prepared data", path)
        return kept

    def _is_empty(self, path: Path) -> bool:
        empty = path.stat().st_size == 0
        return empty and not self._leave("empty", path)

    def _notes(self) -> list[str]:
        notes = []
        for why, paths in self._left_out.items():
            kinds = Counter(path.suffix or path.name for path in paths)
            names = ", ".join(printable(str(path)) for path in paths[:_NAMED])
            more = ", ..." if len(paths) > _NAMED else ""
            note = f"{_files(len(paths))} skipped, {why}: {names}{more}"
            if why.startswith("of formats"):
                counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
                as_text = f"--set data_text.train='[{{path: {self._wish}, as: text}}]'"
                note += f" ({printable(counts)}; to read all as text: {as_text})"
            notes.append(note)
        return notes


def _files(count: int) -> str:
    return "1 file is" if count == 1 else f"{count:,} files are"


def _is_metadata(path: Path) -> bool:
    """Whether it is NAME.meta.jsonl next to NAME.bin."""
    name = path.name.removesuffix(".meta.jsonl")
    return name != path.name and path.with_name(f"{name}.bin").exists()


def _goes_with_ids(path: Path) -> bool:
    """Whether it is a metadata file of an id file."""
    if path.name in _OF_IDS:
        return any(path.parent.glob("*.bin"))
    return path.name.endswith(_BESIDE_IDS) and path.with_suffix(".bin").exists()


def _holds_text(path: Path) -> bool:
    """Whether a file starts like text; of compressed files only .txt.gz counts."""
    if format_of(path, as_text=True).packing:
        return bool(suffix_of(path))
    with path.open("rb") as file:
        return b"\0" not in file.read(_HEAD)
