"""Decide which files are for evaluation, and find files used twice or on both sides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_plugins._shared.cache import signature
from nexus_plugins._shared.paths import printable

__all__ = ["Split", "copies", "in_words", "repeated", "split_by_name"]

_EVALUATION = {"val", "valid", "validation"}
_NAMED = 3


@dataclass(frozen=True)
class Split:
    """The files of a folder, split by name.

    Args:
        train: to train on.
        valid: named as held-out data (`*_val_*`, `valid.txt`, `validation/`).
        test: named as test data, next to files of the same name with "train" in its place.
    """

    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()


def split_by_name(files: Sequence[Path], root: Path) -> Split:
    """Split the files of a folder or glob by name; if none is left to train on, all are used."""
    words = {path: _words(path, root) for path in files}
    kinds = {frozenset(words[path]) for path in files}
    valid = [path for path in files if words[path] & _EVALUATION]
    test = [
        path
        for path in files
        if "test" in words[path] and (words[path] ^ {"test", "train"}) in kinds
    ]
    apart = {*valid, *test}
    train = tuple(path for path in files if path not in apart)
    return Split(train, tuple(valid), tuple(test)) if train else Split(tuple(files))


def _words(path: Path, root: Path) -> frozenset[str]:
    """The words in the name of a file and of its folders below the root, without numbers."""
    below = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    return frozenset(re.findall(r"[^\W\d_]+", str(below).lower()))


def copies(files: Iterable[Path], among: Iterable[Path]) -> list[Path]:
    """The files that are also among the others: the same files, links to them, or copies."""
    others = list(dict.fromkeys(among))
    sizes = {path.stat().st_size for path in others}
    alike = [path for path in files if path.stat().st_size in sizes]
    if not alike:
        return []
    wanted = {path.stat().st_size for path in alike}
    looks = {_look(path) for path in others if path.stat().st_size in wanted}
    return [path for path in alike if _look(path) in looks]


def repeated(files: Sequence[Path]) -> list[Path]:
    """The files that appeared earlier, under the same name or as copies."""
    sizes = Counter(path.stat().st_size for path in files)
    seen: set[tuple[object, ...]] = set()
    found = []
    for path in files:
        if sizes[path.stat().st_size] > 1:
            look = _look(path)
            if look in seen:
                found.append(path)
            seen.add(look)
    return found


def _look(path: Path) -> tuple[object, ...]:
    """Size and content, of a large file in samples."""
    _, size, _, look = signature([path])[0]
    return size, look


def in_words(files: Sequence[Path]) -> str:
    """Phrase like "2 files (a.txt, b.txt; 1,234 bytes) are"."""
    names = ", ".join(printable(str(path)) for path in files[:_NAMED])
    more = ", ..." if len(files) > _NAMED else ""
    size = sum(path.stat().st_size for path in files)
    count, verb = ("1 file", "is") if len(files) == 1 else (f"{len(files):,} files", "are")
    return f"{count} ({names}{more}; {size:,} bytes) {verb}"
