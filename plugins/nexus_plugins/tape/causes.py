"""The likely cause of a difference, in words."""

from __future__ import annotations

from torch import Tensor

from nexus_plugins.tape.facts import Fact, near
from nexus_plugins.tape.probe import Moment

__all__ = ["cause", "surroundings", "words"]


def cause(
    pair: tuple[Moment, Moment], values: tuple[Tensor | None, Tensor | None], found: list[Fact]
) -> str:
    """The likely cause of the first difference between two steps.

    Args:
        pair: the first differing moment of each run.
        values: its tensors, if it has any.
        found: what is known to differ between the runs.
    """
    one, other = pair
    plugin = one.name.rpartition("after ")[2] if "after " in one.name else ""
    if one.about != other.about and None not in values:
        return f"different type or shape: {one.about} | {other.about}" + _facts(found, one.phase)
    if one.phase == "batch" and values[0] is not None and values[1] is not None:
        return _rows(values[0], values[1]) + _facts(found, "batch", plugin)
    return words(one.phase, plugin, found)


def words(phase: str, plugin: str, found: list[Fact]) -> str:
    """The usual cause of a difference in a phase, and known differences that may explain it."""
    what = {
        "batch": "different rows, or a different order",
        "generators": "a generator's state differs: something drew random numbers, or seeded it",
        "start": "the state already differs before the step",
        "forward": "the same batch, weights and generators give a different result: different "
        "code, unsaved state, or different rounding",
        "loss": "the loss term is computed, counted or weighed differently",
        "backward": "the same losses have a different gradient: different code or rounding",
        "gradient": "a plugin changes the gradient differently",
        "settings": "the optimizer has different settings, such as the learning rate",
        "update": "the same gradient gives another update, or something changed the weights after",
        "end": "a plugin has a different state",
    }[phase]
    named = f"{what} ({plugin})" if plugin else what
    return named + _facts(found, phase, plugin)


def _facts(found: list[Fact], phase: str, plugin: str = "") -> str:
    close = near(found, phase, plugin)
    return f"; differs: {'; '.join(map(str, close[:3]))}" if close else ""


def surroundings(found: list[Fact]) -> str:
    """Why neither run may be reproducible."""
    close = [fact for fact in found if fact.kind in ("environment", "version")]
    said = f"; differs: {'; '.join(map(str, close))}" if close else ""
    return f": this machine or its packages differ from theirs{said}"


def _rows(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape or one.ndim == 0:
        return "the batches have different shapes"
    rows = [one.flatten(1), other.flatten(1)] if one.ndim > 1 else [one[:, None], other[:, None]]
    odd = (rows[0] != rows[1]).any(1).nonzero().flatten().tolist()
    mine, theirs = (sorted(map(tuple, part.tolist())) for part in rows)
    shown = ", ".join(map(str, odd[:8]))
    if mine == theirs:
        return f"the same rows in a different order (rows {shown})"
    return f"{len(odd)} of {len(one)} rows differ (rows {shown})"
