"""Line charts in the terminal and, if matplotlib is installed, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase

__all__ = ["NO_PICTURE", "Chart", "Line", "save_picture", "text_chart"]

NO_PICTURE = "none; for a PNG: pip install 'nexus-trainer[plot]'"
MARKED = 5  # points of a line marked with its letter


@dataclass(frozen=True)
class Line:
    """One line of a chart: finite numbers `y` over `x`, of the same length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A chart to draw.

    Args:
        lines: at least one, each of at least one point.
        x_label: what `x` is, with its unit.
        y_label: what `y` is, with its unit.
        y_limits: smallest and largest `y` to show.
        log_x: whether the `x` axis is logarithmic.
        marks: values of `x` to mark, by name; shown only in the PNG.
    """

    lines: Sequence[Line]
    x_label: str
    y_label: str
    y_limits: tuple[float, float]
    log_x: bool = False
    marks: Mapping[str, float] | None = None


def text_chart(chart: Chart, *, width: int = 60, height: int = 12) -> str:
    """Draw in Unicode, `width` by `height` characters inside the axes, in one colour.

    With several lines, letters mark them: `a` the first, `b` the second.
    """
    import plotille

    place = math.log10 if chart.log_x else float
    figure = plotille.Figure()
    figure.width, figure.height, figure.with_colors = width, height, False
    figure.x_label, figure.y_label = chart.x_label, chart.y_label
    figure.y_ticks_fkt = lambda low, _: f"{low:9.2e}"
    figure.x_ticks_fkt = lambda low, _: f"{10**low:.1e}" if chart.log_x else f"{low:.6g}"
    figure.origin = False
    columns = [place(x) for line in chart.lines for x in line.x]
    figure.set_x_limits(min(columns), max(columns) if len(set(columns)) > 1 else columns[0] + 1)
    figure.set_y_limits(*chart.y_limits)
    for line in chart.lines:
        figure.plot([place(x) for x in line.x], list(line.y), label=line.label)
    if len(chart.lines) > 1:
        for letter, line in zip(ascii_lowercase, chart.lines, strict=False):
            chosen = sorted({round(i * (len(line.x) - 1) / MARKED) for i in range(MARKED + 1)})
            columns = [place(line.x[i]) for i in chosen]
            figure.scatter(columns, [line.y[i] for i in chosen], marker=letter)
    drawn: str = figure.show()
    return "\n".join(row.rstrip(" \N{BRAILLE PATTERN BLANK}") for row in drawn.splitlines())


def save_picture(chart: Chart, path: Path) -> Path | None:
    """Write a PNG and return its path; None if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in chart.lines:
        axes.plot(line.x, line.y, label=line.label)
    for number, (name, x) in enumerate((chart.marks or {}).items()):
        axes.axvline(x, linestyle="--", color=f"C{number + len(chart.lines)}", label=name)
    if chart.log_x:
        axes.set_xscale("log")
    axes.set_ylim(*chart.y_limits)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
