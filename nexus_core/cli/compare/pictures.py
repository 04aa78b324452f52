"""Charts of a comparison: curves, difference with its interval, and convergence over pairs."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_core.cli.compare.confidence import Estimate, estimate
from nexus_core.cli.compare.pairs import Paired
from nexus_core.cli.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_png", "svg_pictures"]

_SIZE = (5.2, 3.4)  # inches; readable at a phone's width
_BASE = "#555555"


def save_png(groups: Sequence[Paired], metric: str, confidence: float, path: Path) -> Path | None:
    """Draw all three charts of a metric into a PNG; None if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * _SIZE[0], _SIZE[1] + 0.4), layout="constrained")
    for axes, (title, draw) in zip(figure.subplots(1, 3), _DRAWN.items(), strict=True):
        draw(axes, groups, metric, confidence)
        axes.set_title(title)
    figure.savefig(path, dpi=110)
    return path


def svg_pictures(groups: Sequence[Paired], metric: str, confidence: float) -> dict[str, str]:
    """The charts of a metric as SVG, by title; none if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return {}
    import matplotlib as mpl
    from matplotlib.figure import Figure

    pictures = {}
    for title, draw in _DRAWN.items():
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.subplots(), groups, metric, confidence)
        drawn = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": title + metric}):
            figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        pictures[title] = "<svg" + drawn.getvalue().partition("<svg")[2]
    return pictures


def _curves(axes: Axes, groups: Sequence[Paired], metric: str, _: float) -> None:
    """The mean of each side over its runs, and each run behind it."""
    bases = {pair.base.path: pair.base for group in groups for pair in group.pairs}
    _side(axes, "base", list(bases.values()), metric, _BASE)
    for number, group in enumerate(groups):
        _side(axes, group.name, [pair.variant for pair in group.pairs], metric, f"C{number}")
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    _finish(axes)


def _side(axes: Axes, name: str, runs: Sequence[Run], metric: str, color: str) -> None:
    each = [{p.step: p.value for p in run.series.get(metric, ())} for run in runs]
    for values in each:
        axes.plot(list(values), list(values.values()), color=color, alpha=0.25, linewidth=0.8)
    steps = sorted(set.intersection(*map(set, each))) if each else []
    means = [statistics.fmean(values[step] for values in each) for step in steps]
    marker = "o" if len(steps) < 20 else None
    axes.plot(steps, means, color=color, linewidth=1.8, marker=marker, markersize=3, label=name)


def _differences(axes: Axes, groups: Sequence[Paired], metric: str, confidence: float) -> None:
    """Variant minus base at each step that all pairs have, with the interval."""
    for number, group in enumerate(groups):
        each = [pair.differences(metric) for pair in group.pairs]
        steps = sorted(set.intersection(*map(set, each))) if each else []
        found = [estimate([values[step] for values in each], confidence) for step in steps]
        _band(axes, steps, found, f"C{number}", group.name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{metric}, variant - base")
    _finish(axes)


def _settling(axes: Axes, groups: Sequence[Paired], metric: str, confidence: float) -> None:
    """The last difference and its interval after each pair."""
    from matplotlib.ticker import MaxNLocator

    for number, group in enumerate(groups):
        given = [pair.difference(metric) for pair in group.pairs]
        values = [value for value in given if value is not None]
        counts = list(range(1, len(values) + 1))
        found = [estimate(values[:count], confidence) for count in counts]
        _band(axes, counts, found, f"C{number}", group.name)
    axes.set_xlabel("pairs")
    axes.set_ylabel(f"{metric}, variant - base")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def _band(
    axes: Axes, places: Sequence[int], found: Sequence[Estimate], color: str, name: str
) -> None:
    marker = "o" if len(places) < 20 else None
    means = [each.mean for each in found]
    axes.plot(places, means, color=color, linewidth=1.8, marker=marker, markersize=3, label=name)
    known = [(at, each) for at, each in zip(places, found, strict=True) if math.isfinite(each.low)]
    ends = (
        [at for at, _ in known],
        [each.low for _, each in known],
        [each.high for _, each in known],
    )
    if len(known) == 1:
        axes.vlines(ends[0], ends[1], ends[2], color=color, alpha=0.35, linewidth=6)
    elif known:
        axes.fill_between(*ends, color=color, alpha=0.2, linewidth=0)


def _finish(axes: Axes) -> None:
    if axes.get_ylabel().endswith("- base"):
        axes.axhline(0, color=_BASE, linewidth=1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.6)


_DRAWN = {
    "Curves": _curves,
    "Difference by step": _differences,
    "Difference by number of pairs": _settling,
}
