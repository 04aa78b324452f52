"""Text tables for the commands' output."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TextIO

__all__ = ["aligned", "as_bytes", "as_number", "as_time", "folded"]

_PATH = re.compile(r"[\w.,:;=~@%+'\"()-]*[/\\][\w./\\,:;=~@%+'\"()-]*")
NARROWEST = 20
"""Minimum width in columns to which indented text is wrapped."""


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of cells as lines, each column as wide as its widest cell.

    Args:
        rows: all of the same length; the first may be a heading.
        right: indices of right-aligned columns.
    """
    shown = [[_visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def folded(text: str, indent: int = 0, stream: TextIO | None = None) -> str:
    """Wrap text between words if it goes to a terminal.

    A word longer than a line is broken, unless it is a path. For a file or pipe the text is
    unchanged.

    Args:
        text: one or more lines.
        indent: columns to the left of the text; on the first line something else is already there.
        stream: the destination; None: standard output.
    """
    lines = text.split("\n")
    if (stream or sys.stdout).isatty():
        width = max(shutil.get_terminal_size().columns - indent, NARROWEST)
        fold = textwrap.TextWrapper(
            width, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
        )
        lines = [part for line in lines for part in fold.wrap(_broken(line, width)) or [""]]
    return ("\n" + " " * indent).join(lines)


def _broken(line: str, width: int) -> str:
    """The line with spaces in words that are longer than the width, such as sampled text."""
    return re.sub(
        rf"\S{{{width + 1},}}",
        lambda word: (
            word[0] if _PATH.fullmatch(word[0]) else re.sub(rf"(.{{{width}}})", r"\1 ", word[0])
        ),
        line,
    )


def as_bytes(size: int) -> str:
    """A human-readable size: `812 B`, `34 kB`, `1.2 GB`."""
    number, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{number:.1f} {unit}" if number < 10 and unit != "B" else f"{number:.0f} {unit}"


def as_time(seconds: float | None) -> str:
    """A human-readable duration: `4.2 s`, `3 min 05 s`, `2 h 07 min`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def as_number(value: float | None) -> str:
    """A metric, as notebooks show it; empty for None."""
    from nexus_core.views.tables import number  # imports torch, so only where needed

    return "" if value is None else number(value)


def _visible(text: str) -> str:
    """Text on one line, with terminal control characters escaped."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
