"""Plot a history: one panel per metric, training and evaluation together."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nexus_core.errors import ConfigError, suggestion
from nexus_core.views.history import History
from nexus_core.views.tables import by_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

MOST_PANELS = 6
ACROSS = 3
PANEL = (4.2, 3.0)  # inches
SPARSE = 30  # points; of fewer, each is marked
Points = tuple[Sequence[float], Sequence[float]]


def draw(history: History, names: Sequence[str]) -> Figure:
    """The figure of `History.plot`.

    It is not created by pyplot, which would make a notebook display it twice.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib: pip install 'nexus-trainer[plot]'")
    from matplotlib.figure import Figure

    panels = _panels(history, names)
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    size = (max(6.0, across * PANEL[0]), max(3.5, down * PANEL[1]))
    figure = Figure(figsize=size, layout="constrained")
    figure._repr_png_ = lambda: _png(figure)  # type: ignore[attr-defined]
    splits = dict.fromkeys(split for lines in panels.values() for split in lines)
    colors = {split: f"C{place}" for place, split in enumerate(splits)}
    for place, (title, lines) in enumerate(panels.items(), start=1):
        _draw(figure.add_subplot(down, across, place), title, lines, colors)
    return figure


def _panels(history: History, names: Sequence[str]) -> dict[str, dict[str, Points]]:
    """The lines of each panel, by title and split.

    Raises:
        ConfigError: there is nothing to plot, or no such metric.
    """
    points: dict[str, Points] = {name: history.points(name) for name in history.names}
    found = by_metric({name: line for name, line in points.items() if line[0]})
    if not found:
        raise ConfigError("there is no metric yet to plot; train first: fit(data, until=...)")
    if not names:
        ordered = sorted(found, key=lambda metric: _importance(metric, found[metric]))
        return {metric: found[metric] for metric in ordered[:MOST_PANELS]}
    for name in names:
        if name not in found and name not in points:
            known = [*found, *points]
            raise ConfigError(
                f"there is no metric '{name}'.{suggestion(name, known)} There are: "
                f"{', '.join(found)}; or with the split, such as {min(points)}"
            )
    return {name: found.get(name) or {name: points[name]} for name in names}


def _importance(metric: str, lines: Mapping[str, Points]) -> tuple[bool, bool, bool]:
    """Sort key: metrics that are evaluated first, then losses, then the rest of training."""
    return not lines.keys() - {"train", "system"}, "loss" not in metric, "system" in lines


def _draw(axes: Axes, title: str, lines: Mapping[str, Points], colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for split, (steps, values) in lines.items():
        mark = "o" if len(steps) <= SPARSE else None
        axes.plot(
            steps, values, color=colors[split], label=split, marker=mark, markersize=3,
            linewidth=1.2,
        )  # fmt: skip
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(alpha=0.25)
    if len(lines) > 1 or title not in lines:
        axes.legend(fontsize=8, framealpha=0.6)


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    return drawn.getvalue()
