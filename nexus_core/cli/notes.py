"""The notes by which runs are compared: the plugin that keeps them, and their lines.

An installed package names the plugin by the entry-point group `nexus.witness`. It has the settings
`file` and `at_once`, writes an object a line, with the `step`, and one with a `session` wherever
the run begins or is resumed. A run in cells has the same lines on any number of processes, but for
those of the sessions.
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
LABEL = "witness"  # beside an instance that the run has by itself
_CHAIN = "chain"  # of a line and all before it: it says that there is a difference, and not which


def witness() -> AnyPlugin:
    """A plugin that writes down each step of a run, within the step.

    Raises:
        PluginError: no installed package gives one.
    """
    for entry in entry_points(group=GROUP):
        return load(entry.name).labelled(LABEL)(file=NOTES, at_once=True)
    raise PluginError(f"no installed package names a plugin in the entry-point group {GROUP}")


def companions() -> list[str]:
    """Names of the plugins that installed packages add to a run which is compared to the bit."""
    return sorted(entry.name for entry in entry_points(group="nexus.verify"))


def notes_of(out: Path) -> list[dict[str, Any]]:
    """What was written down of each step."""
    lines = map(json.loads, whole_lines(out / NOTES))
    return [{k: v for k, v in line.items() if k != _CHAIN} for line in lines if "step" in line]


def starts_of(out: Path) -> list[int]:
    """The steps after which the lives of a run began, but for those that were done again."""
    lines = map(json.loads, whole_lines(out / NOTES))
    return [line["session"]["step"] for line in lines if "session" in line]


def fingerprint(out: Path) -> str:
    """A hash of what was written down of the last step, which has the whole state."""
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
    """The whole lines of a file, which may be cut off by a kill; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
