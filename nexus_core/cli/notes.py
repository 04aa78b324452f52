"""The per-step notes by which runs are compared, and the plugin that writes them.

An installed package declares the plugin with the entry-point group `nexus.witness`. It has the
settings `file` and `at_once`, and writes one JSON object per line: one for each `step`, and one
with a `session` wherever the run starts or is resumed. A run in cells writes the same lines on
any number of processes, except those of the sessions.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nexus_core.errors import PluginError
from nexus_core.plan import AnyPlugin, load

__all__ = [
    "NOTES",
    "companions",
    "fingerprint",
    "last_step",
    "notes_of",
    "starts_of",
    "whole_lines",
    "witness",
]

NOTES = "witness.jsonl"
GROUP = "nexus.witness"
LABEL = "witness"  # next to an instance that the run itself enables
_CHAIN = "chain"  # hash of a line and all before it: shows that they differ, not where


def witness() -> AnyPlugin:
    """A plugin that records each step of a run, during the step.

    Raises:
        PluginError: no installed package provides one.
    """
    for entry in entry_points(group=GROUP):
        return load(entry.name).labelled(LABEL)(file=NOTES, at_once=True)
    raise PluginError(f"no installed package provides a plugin in the entry-point group {GROUP}")


def companions() -> list[str]:
    """Names of the plugins that installed packages add to runs that are compared bitwise."""
    return sorted(entry.name for entry in entry_points(group="nexus.verify"))


def notes_of(out: Path) -> list[dict[str, Any]]:
    """The notes of each step."""
    lines = map(json.loads, whole_lines(out / NOTES))
    return [{k: v for k, v in line.items() if k != _CHAIN} for line in lines if "step" in line]


def starts_of(out: Path) -> list[int]:
    """The steps at which the sessions of a run started, except those that were repeated."""
    lines = map(json.loads, whole_lines(out / NOTES))
    return [line["session"]["step"] for line in lines if "session" in line]


def fingerprint(out: Path) -> str:
    """A hash of the last step's notes, which cover the whole state."""
    return hashlib.sha256(json.dumps(notes_of(out)[-1]).encode()).hexdigest()[:32]


def last_step(path: Path) -> int:
    """The step of the last whole line of notes; 0 if no line is whole."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    last = json.loads(whole.rpartition(b"\n")[2] or "{}")
    return int(last.get("session", last).get("step", 0))


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a file (a kill may cut the last one); empty if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
