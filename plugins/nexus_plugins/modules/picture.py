"""The plot of a contest: learning curves, and the measure specific to each puzzle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from nexus_plugins.modules.looks import Depth, Edges, Hops, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curves", "draw", "is_drawable"]

Curves: TypeAlias = Mapping[str, Sequence[Sequence[float]]]
"""By `puzzle/contender`: pairs of a step and the held-out cross-entropy after it, in nats."""
Panel: TypeAlias = "tuple[str, Callable[[Axes], None]]"

COLUMNS = 3
SIZE = (4.6, 3.3)  # inches of a panel
COLOURS = ("#c2410c", "#334155", "#94a3b8", "#0f766e", "#7c3aed")
"""Of contenders, in their order: the first of a puzzle is what it is for."""


def is_drawable() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(curves: Curves, looks: Sequence[Look], path: Path) -> None:
    """Write the plot as a PNG.

    Args:
        curves: of all contenders.
        looks: what an evaluation found.
        path: of the file.
    """
    from matplotlib.figure import Figure

    panels = [*_learning(curves), *_measures(looks)]
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    count = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(columns * SIZE[0], count * SIZE[1]), layout="constrained")
    spots = [*figure.subplots(count, columns, squeeze=False).flat]
    for axes in spots:
        axes.set_axis_off()
    for (title, fill), axes in zip(panels, spots, strict=False):
        axes.set_axis_on()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        fill(axes)
    figure.savefig(path, dpi=120)


def _learning(curves: Curves) -> list[Panel]:
    """A panel for each puzzle that has a cross-entropy."""
    of: dict[str, dict[str, Sequence[Sequence[float]]]] = {}
    for place, curve in curves.items():
        puzzle, _, name = place.partition("/")
        if curve:
            of.setdefault(puzzle, {})[name] = curve
    return [(f"{puzzle}: cross-entropy", partial(_curves, own)) for puzzle, own in of.items()]


def _measures(looks: Sequence[Look]) -> list[Panel]:
    """A panel for each module that was measured, and one for the answers of all contenders."""
    hops = [look for look in looks if isinstance(look, Hops)]
    return [
        *((f"{_puzzle(look)}: refinements by noise", partial(_depth, look))
          for look in looks if isinstance(look, Depth)),
        *([(f"{_puzzle(hops[0])}: right answers", partial(_hops, hops))] if hops else []),
        *((f"{_puzzle(look)}: strengths found", partial(_graph, look))
          for look in looks if isinstance(look, Edges)),
    ]  # fmt: skip


def _curves(own: Curves, axes: Axes) -> None:
    for number, (name, curve) in enumerate(own.items()):
        steps, nats = zip(*curve, strict=True)
        label = f"{name} {nats[-1]:.2f}"
        width = 2.4 if number == 0 else 1.6
        axes.plot(steps, nats, color=_colour(number), linewidth=width, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out nats per token")
    axes.legend(frameon=False, fontsize=9)


def _depth(look: Depth, axes: Axes) -> None:
    level, refinements = look.level.numpy(), look.refinements.numpy()
    axes.scatter(level, refinements, s=14, color=COLOURS[0], alpha=0.7, linewidths=0)
    axes.set_xlabel("noise in the row")
    axes.set_ylabel("refinements per token")
    axes.set_ylim(bottom=0)


def _hops(looks: Sequence[Hops], axes: Axes) -> None:
    width = 0.8 / len(looks)
    for number, look in enumerate(looks):
        shift = (number - (len(looks) - 1) / 2) * width
        centers = [hop + shift for hop in range(1, len(look.right) + 1)]
        name = look.place.rpartition("/")[2]
        axes.bar(centers, look.right, width * 0.92, color=_colour(number), label=name)
    axes.set_xticks(range(1, len(looks[0].right) + 1))
    axes.set_ylim(0, 1.2)  # room for the legend
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("hops")
    axes.set_ylabel("share of right answers")
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=len(looks))


def _graph(look: Edges, axes: Axes) -> None:
    """Strengths as shades, with a ring around each true edge."""
    axes.imshow(look.strengths.numpy(), cmap="Oranges", vmin=0)
    effects, causes = look.edges.T.numpy().nonzero()
    axes.scatter(effects, causes, s=70, facecolors="none", edgecolors=COLOURS[1], label="true edge")
    axes.set_xlabel(f"effect\n{look.summary}")
    axes.set_ylabel("cause")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def _puzzle(look: Look) -> str:
    return look.place.partition("/")[0]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
