"""Read runs from disk: where they are, how they ended, and their metrics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nexus_core.cli.config_file import read_config_file
from nexus_core.cli.lineage import Lineage, read_lineage
from nexus_core.errors import ConfigError

__all__ = ["DataNote", "Point", "Run", "find_runs", "open_run"]

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
_SIGNS = (METRICS, SUMMARY, "run*.lock", "checkpoints*")
"""Files that mark a run next to its config; a folder with only a config is a template."""
_COUNTERS = ("step", "time", "tokens")
_TAIL = 2**16  # bytes read from the end of a metrics file for its last lines


@dataclass(frozen=True)
class Point:
    """A value of a metric, with its step and token count."""

    step: int
    tokens: int
    value: float


@dataclass(frozen=True)
class DataNote:
    """What a checkpoint records about the run's data; None: not recorded."""

    fingerprint: str | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Run:
    """One run on disk; everything is read lazily and cached.

    Args:
        path: the run folder.
        name: the run's name as displayed.
    """

    path: Path
    name: str = field(compare=False, default="")

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The resolved config.

        Raises:
            ConfigError: it is invalid.
        """
        content: dict[str, Any] = read_config_file(self.path / CONFIG).value
        return content

    @property
    def seed(self) -> int:
        """The seed of the run."""
        seed = self.settings.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    @cached_property
    def lineage(self) -> Lineage:
        """Where the run comes from, and which runs branch off it."""
        return read_lineage(self.path)

    @cached_property
    def status(self) -> str:
        """How it ended: finished, stopped, interrupted or failed; or running, or unfinished."""
        if any(map(_is_held, self.path.glob("run*.lock"))):
            return "running"
        beyond = _count(self._last, "step") > _count(self.summary, "steps")
        return "unfinished" if beyond else str(self.summary.get("status", "unfinished"))

    @property
    def reason(self) -> str:
        """Why it ended, if the run recorded it."""
        return str(self.summary.get("reason", "")) if self.status in _ENDS else ""

    @property
    def step(self) -> int:
        """The last known step."""
        return max(_count(self.summary, "steps"), _count(self._last, "step"))

    @property
    def tokens(self) -> int:
        """The number of tokens trained on, as far as known."""
        return max(_count(self.summary, "tokens"), _count(self._last, "tokens"))

    @property
    def seconds(self) -> float | None:
        """Training time; None if it has not ended."""
        seconds = self.summary.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    @cached_property
    def last_metrics(self) -> Mapping[str, float]:
        """The last value of each metric, by its name."""
        last = self.summary.get("metrics", {})
        return {**numbers(last if isinstance(last, dict) else {}), **self._tail}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The summary written when it last ended; empty if it has not."""
        return _object(self.path / SUMMARY)

    @cached_property
    def series(self) -> Mapping[str, tuple[Point, ...]]:
        """Every value of each metric, by its name, in the order of the steps.

        Raises:
            ConfigError: the file cannot be read.
        """
        found: dict[str, dict[int, Point]] = {}
        try:
            with (self.path / METRICS).open("rb") as file:
                for record in _records(file):
                    step, tokens = record["step"], _count(record, "tokens")
                    for name, value in numbers(record).items():
                        found.setdefault(name, {})[step] = Point(step, tokens, value)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"cannot read the metrics of '{self.path}': {error}") from error
        return {
            name: tuple(points[step] for step in sorted(points)) for name, points in found.items()
        }

    @cached_property
    def size(self) -> int:
        """Bytes of all its files; links are not followed."""
        total = 0
        for folder, _, files in os.walk(self.path):
            for name in files:
                with suppress(OSError):  # deleted meanwhile
                    total += os.lstat(Path(folder, name)).st_size
        return total

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, oldest first."""
        found = [p for p in self.path.glob("checkpoints*/step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    @cached_property
    def data(self) -> DataNote:
        """What the newest checkpoint records about the data."""
        for checkpoint in reversed(self.checkpoints):
            content = _object(checkpoint / "state.json").get("data")
            if isinstance(content, dict):
                return DataNote(content.get("fingerprint"), content.get("batch_size"))
        return DataNote()

    @cached_property
    def _ending(self) -> list[dict[str, Any]]:
        """The last lines of the metrics file."""
        try:
            with (self.path / METRICS).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                return list(_records(file))
        except OSError:
            return []

    @property
    def _last(self) -> dict[str, Any]:
        return self._ending[-1] if self._ending else {}

    @cached_property
    def _tail(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for record in self._ending:
            found.update(numbers(record))
        return found


_ENDS = ("finished", "stopped", "interrupted", "failed")


def find_runs(folder: Path) -> list[Run]:
    """Every run in or below a folder, by path; folders inside a run are not searched.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not folder.is_dir():
        raise ConfigError(f"'{folder}' is not a folder; give one that contains runs, such as runs/")
    found = []
    for place, folders, files in os.walk(folder):
        path = Path(place)
        if CONFIG in files and _is_run(path):
            found.append(Run(path, str(path.relative_to(folder)) if path != folder else str(path)))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def open_run(folder: Path) -> Run:
    """Open the run in a folder.

    Raises:
        ConfigError: the folder does not contain a run.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"'{folder}' is not a run folder (no {CONFIG}); nexus-run runs lists those that "
            "there are"
        )
    return Run(folder, str(folder))


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numeric metrics of a line or summary."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in _COUNTERS
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _is_run(path: Path) -> bool:
    return any(any(path.glob(sign)) for sign in _SIGNS)


def _is_held(lock: Path) -> bool:
    """Whether a process holds a run's lock; a released lock file is empty."""
    try:
        import fcntl
    except ImportError:  # Windows: rely on the file's content
        return lock.stat().st_size > 0
    try:
        with lock.open("rb") as file:
            if not file.read(1):
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held; or the file system cannot tell, and the file says so
        return True
    return False


def _count(record: Mapping[str, Any], key: str) -> int:
    value = record.get(key)
    return value if isinstance(value, int) else 0


def _records(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The metric lines; torn lines at either end and notes are skipped."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        whole = isinstance(record, dict) and isinstance(record.get("step"), int)
        if whole and "note" not in record:
            yield record


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
