"""Which run a run branched off, and which branched off it: `lineage.jsonl` in the run folder.

Each line is an object with one key. A branch has one line `parent`; a run has a line `branch` for
each run that branched off it. Lines are appended atomically, so many branches may start at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["FILE", "Lineage", "Relation", "changes", "note_branch", "note_parent", "read_lineage"]

FILE = "lineage.jsonl"


@dataclass(frozen=True)
class Relation:
    """One run continued from a checkpoint of another.

    Args:
        run: absolute path of the other run's folder.
        step: step of the checkpoint.
        source: path of the checkpoint in the parent's folder, such as `checkpoints/step-00005000`.
        changes: each setting that differs, by its key, with its values in the parent and in the
            branch; null if one of them does not have it.
    """

    run: str
    step: int
    source: str
    changes: Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Lineage:
    """The relations of a run.

    Args:
        parent: the run that it branched off; None: it is not a branch.
        branches: the runs that branched off it, oldest first; they may have been deleted since.
    """

    parent: Relation | None = None
    branches: tuple[Relation, ...] = ()


def note_parent(folder: Path, parent: Relation) -> None:
    """Record in a branch which run it branched off."""
    _append(folder, "parent", parent)


def note_branch(folder: Path, parent: Relation) -> None:
    """Record in the parent that a run branched off it.

    Args:
        folder: folder of the branch.
        parent: as recorded in the branch.

    Raises:
        OSError: the parent's folder cannot be written.
    """
    _append(Path(parent.run), "branch", replace(parent, run=str(folder.absolute())))


def read_lineage(folder: Path) -> Lineage:
    """Read the relations of the run in a folder; incomplete lines are skipped."""
    parent, branches = None, list[Relation]()
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Lineage()
    for line in lines:
        kind, relation = _relation(line)
        if relation is not None and kind == "parent":
            parent = relation
        elif relation is not None and kind == "branch":
            branches.append(relation)
    return Lineage(parent, tuple(branches))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two resolved configs, by key, with both values.

    A plugin that only one of them has counts as one setting; the run folder is ignored.
    """
    found = dict[str, tuple[Any, Any]]()
    for name in {**before, **after}:
        if name not in ("out", "plugins"):
            found |= _differing(name, before.get(name), after.get(name))
    ours, theirs = before.get("plugins") or {}, after.get("plugins") or {}
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None:
            found[name] = (one, other)
            continue
        for key in {**one, **other}:
            found |= _differing(f"{name}.{key}", one.get(key), other.get(key))
    return found


def _differing(key: str, one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    return {} if one == other else {key: (one, other)}


def _append(folder: Path, kind: str, relation: Relation) -> None:
    line = json.dumps({kind: asdict(relation)}) + "\n"
    place = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        os.write(place, line.encode())
    finally:
        os.close(place)


def _relation(line: str) -> tuple[str, Relation | None]:
    try:
        ((kind, content),) = json.loads(line).items()
        pairs = {key: (one, other) for key, (one, other) in content["changes"].items()}
        texts = str(content["run"]), int(content["step"]), str(content["source"])
        return kind, Relation(*texts, pairs)
    except (ValueError, TypeError, LookupError, AttributeError):
        return "", None
