"""The tape file: one JSON object per line, each chained to the previous one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_core.errors import CheckpointError
from nexus_plugins._shared.files import opened

__all__ = ["FILE", "PARTS", "Tape", "chained", "differing", "encoded", "read_tape"]

FILE = "tape.jsonl"
PARTS = (
    "batches",
    "inputs",
    "generators",
    "losses",
    "gradient",
    "settings",
    "weights",
    "optimizer",
    "plugins",
)
"""The parts of a line in the order of a step, so the first to differ is nearest the cause."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Tape:
    """The content of a tape.

    Args:
        lines: the steps' lines, by number, in order.
        sessions: where and how the run was started and resumed, in order: `step`, `every`,
            `modules` and `environment`.
    """

    lines: Mapping[int, Line]
    sessions: tuple[Line, ...] = ()

    def environment(self, step: int) -> Mapping[str, Any]:
        """The environment of the process that took a step."""
        before = [session for session in self.sessions if session["step"] < step]
        found: Mapping[str, Any] = before[-1]["environment"] if before else {}
        return found

    def broken(self) -> int | None:
        """The first step whose line has been altered; None: the chain is intact."""
        previous = None
        for step, line in self.lines.items():
            before = line["chain"] if previous is None else chained(previous, line)
            if before != line["chain"]:
                return step
            previous = line["chain"]
        return None


def chained(previous: str, line: Mapping[str, Any]) -> str:
    """The chain digest up to this line: a hash of the line and the previous digest."""
    content = {key: value for key, value in line.items() if key != "chain"}
    text = previous + json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def encoded(line: Mapping[str, Any]) -> str:
    """Encode a line of the file."""
    return json.dumps(line, allow_nan=False) + "\n"


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parts of both lines that differ, in the order in which a step produces them.

    Returns:
        The names within each part that differ: modules, generators, terms, plugins; an empty list
        if a part has no names. Names that only one line has are ignored.
    """
    found = dict[str, list[str]]()
    for part in PARTS:
        mine, theirs = one.get(part), other.get(part)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            names = [name for name in mine if name in theirs and mine[name] != theirs[name]]
            if names:
                found[part] = names
        elif mine is not None and theirs is not None and mine != theirs:
            found[part] = []
    return found


def read_tape(run: Path, file: str = FILE) -> Tape:
    """The tape in a run folder; empty if it has none. A truncated last line is skipped."""
    lines, sessions = dict[int, Line](), list[Line]()
    for record in _records(run / file):
        if isinstance(session := record.get("session"), dict):
            sessions.append(session)
        elif isinstance(step := record.get("step"), int):
            lines[step] = record
    return Tape(dict(sorted(lines.items())), tuple(sessions))


def _records(path: Path) -> Iterator[Line]:
    try:
        with opened(path) as file:
            text = file.readall().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise CheckpointError(f"cannot read the tape {path}: {error.strerror}") from error
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
