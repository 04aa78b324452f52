"""Find where in a step two runs first diverge, and which plugins could be the cause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_core.cli.notes import notes_of
from nexus_core.plan import AnyPlugin

__all__ = ["blame"]

_ADDED = ("accumulate_gradient", "backward", "sum_cells")
PHASES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "batches": ("the data", ("make_data", "on_batch", "cut_batch")),
    "inputs": ("the data", ("make_data", "on_batch", "cut_batch")),
    "generators": ("random numbers", ("make_data", "on_batch")),
    "losses": (
        "the forward pass, or the sum of its losses",
        ("loss_units", "weigh_losses", "accumulate_gradient", "forward", "loss_terms", "sum_cells"),
    ),
    "gradient": ("the backward pass, or its sum", (*_ADDED, "after_backward")),
    "settings": ("the optimizer's settings", ("make_optimizer", "lr_scale")),
    "weights": ("the update", ("optimizer_step", "on_step")),
    "optimizer": ("the update", ("optimizer_step",)),
    "plugins": ("the state of a plugin", ()),
}
"""For each part of a line of notes, in the order in which a step computes them: what computes it,
and the hooks through which a plugin can affect it."""


def blame(one: Path, other: Path, plugins: Sequence[AnyPlugin]) -> str:
    """Say where two runs first differ, and which of their plugins may have caused it.

    Args:
        one: folder of a run with notes.
        other: folder of the other run.
        plugins: of both runs, in order.

    Returns:
        A sentence; "" if the notes do not differ.
    """
    for mine, theirs in zip(notes_of(one), notes_of(other), strict=False):
        for part, (phase, hooks) in PHASES.items():
            if mine.get(part) != theirs.get(part):
                name = _first(part, mine.get(part), theirs.get(part))
                suspects = [name] if part == "plugins" else _suspects(plugins, hooks)
                where = f"{part} of {name}" if name else part
                by = f"; made or changed by {', '.join(suspects)}" if suspects else ""
                return f"step {mine['step']} diverges in {phase} ({where}){by}"
    return ""


def _first(part: str, mine: Any, theirs: Any) -> str:
    """The first module, term, generator or plugin that differs; for gradients, the last."""
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return ""
    odd = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return str(odd[-1 if part == "gradient" else 0])


def _suspects(plugins: Iterable[AnyPlugin], hooks: Sequence[str]) -> list[str]:
    """Plugins that implement one of these hooks; only those that promise nothing, if any."""
    acting = [
        plugin
        for plugin in plugins
        if any(hasattr(plugin, hook) for hook in hooks)
        and not getattr(plugin, "only_watches", False)
    ]
    loose = [plugin.name for plugin in acting if not plugin.topology_invariant]
    return [f"{name}, which does not promise it" for name in loose] or [p.name for p in acting]
