"""A record on disk of the lines sent to a service, which may lose the latest ones if killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["HandedLines", "Line", "last_steps"]

Line: TypeAlias = tuple[int, Mapping[str, Any]]
"""An optimizer step, and metrics, or notes as JSON, by name."""


class HandedLines:
    """A file of lines, each flushed to the operating system as it is added.

    Args:
        path: path of the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add a line."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{json.dumps([step, dict(metrics)])}")  # also after a torn line

    def __iter__(self) -> Iterator[Line]:
        """The lines of this and earlier sessions, except torn ones."""
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    step, metrics = json.loads(line)
                    yield step, metrics

    def missing(self, stored: Mapping[str, int], first: int = 0) -> Iterator[Line]:
        """The lines that a service lacks.

        Args:
            stored: the last step of each metric that it has stored.
            first: it has everything before this step.

        Returns:
            Lines with only the missing metrics.
        """
        for step, metrics in self:
            new = {name: v for name, v in metrics.items() if step > stored.get(name, first - 1)}
            if new:
                yield step, new


def last_steps(lines: Iterable[Line]) -> dict[str, int]:
    """The last step of each metric."""
    steps: dict[str, int] = {}
    for step, metrics in lines:
        steps |= {name: max(step, steps.get(name, step)) for name in metrics}
    return steps
