"""The lines that a service was handed, on disk: it may lose its latest ones in a kill."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["HandedLines", "Line", "last_steps"]

Line: TypeAlias = tuple[int, Mapping[str, Any]]
"""An optimizer step, and metrics, or what JSON holds of notes, by name."""


class HandedLines:
    """A file of lines, each of which is with the system as soon as it is added.

    Args:
        path: of the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add a line."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{json.dumps([step, dict(metrics)])}")  # also after a torn line

    def __iter__(self) -> Iterator[Line]:
        """The lines of this session and of those before it, but for torn ones."""
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    step, metrics = json.loads(line)
                    yield step, metrics

    def missing(self, stored: Mapping[str, int], first: int = 0) -> Iterator[Line]:
        """What a service has not.

        Args:
            stored: the last step of each metric that it has.
            first: it has everything before this step.

        Returns:
            Lines with the metrics that it has not.
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
