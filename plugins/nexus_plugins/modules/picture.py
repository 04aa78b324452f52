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

    panels = [*_courses(curves), *_found(looks)]
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


def _courses(curves: Curves) -> list[Panel]:
    """A panel for each puzzle that has a cross-entropy."""
    of: dict[str, dict[str, Sequence[Sequence[float]]]] = {}
    for place, course in curves.items():
        puzzle, _, name = place.partition("/")
        if course:
            of.setdefault(puzzle, {})[name] = course
    return [(f"{puzzle}: {next(iter(own))}", partial(_course, own)) for puzzle, own in of.items()]


def _course(own: Curves, axes: Axes) -> None:
    for number, (name, course) in enumerate(own.items()):
        steps, nats = zip(*course, strict=True)
        label = f"{name} {nats[-1]:.2f}"
        width = 2.4 if number == 0 else 1.6
        axes.plot(steps, nats, color=_colour(number), linewidth=width, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token, held out")
    axes.legend(frameon=False, fontsize=9)


def _found(looks: Sequence[Look]) -> list[Panel]:
    panels: list[Panel] = []
    hops = [look for look in looks if isinstance(look, Hops)]
    for look in looks:
        if isinstance(look, Depth):
            panels.append(("deeper where it is harder", partial(_depth, look)))
        elif isinstance(look, Edges):
            share = look.metrics["edges_found"]
            panels.append((f"graph: {share:.0%} of the edges", partial(_graph, look)))
    if hops:
        panels.insert(1, ("right answers by hops", partial(_hops, hops)))
    return panels


def _depth(look: Depth, axes: Axes) -> None:
    axes.scatter(
        look.level.numpy(),
        look.refinements.numpy(),
        s=14,
        color=COLOURS[0],
        alpha=0.7,
        linewidths=0,
    )
    axes.set_xlabel("noise in the row")
    axes.set_ylabel("refinements a token")
    axes.set_ylim(bottom=0)


def _hops(looks: Sequence[Hops], axes: Axes) -> None:
    width = 0.8 / len(looks)
    for number, look in enumerate(looks):
        places = [
            hop + 1 + (number - (len(looks) - 1) / 2) * width for hop in range(len(look.right))
        ]
        name = look.place.rpartition("/")[2]
        axes.bar(places, look.right, width * 0.92, color=_colour(number), label=name)
    axes.set_xticks(range(1, len(looks[0].right) + 1))
    axes.set_ylim(0, 1.2)  # room for the legend
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("hops")
    axes.set_ylabel("right answers")
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=len(looks))


def _graph(look: Edges, axes: Axes) -> None:
    """Strengths as shades; rings are edges that there are."""
    axes.imshow(look.strengths.numpy(), cmap="Oranges", vmin=0)
    effects, causes = look.edges.T.numpy().nonzero()
    axes.scatter(
        effects,
        causes,
        s=70,
        facecolors="none",
        edgecolors=COLOURS[1],
        label="an edge that there is",
    )
    axes.set_xlabel("effect")
    axes.set_ylabel("cause")
    axes.set_xticks([])
    axes.set_yticks([])


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
