"""The loss algebra: sums over units become means over the whole step, whatever its split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TypeVar

import torch
from torch import Tensor

from nexus_core.errors import PluginError
from nexus_core.ranks import Ranks

__all__ = ["means", "merge", "metric", "step_units", "weighted"]

Value = TypeVar("Value")
Units = Mapping[str, Tensor | float]


def metric(split: str, term: str) -> str:
    """The name under which a term is logged: `train/lm_loss` (the term `loss`: `train/loss`)."""
    return f"{split}/loss" if term == "loss" else f"{split}/{term}_loss"


def merge(answers: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """One dict of all plugins' terms; a term that two plugins give is an error."""
    merged: dict[str, Value] = {}
    for answer in answers:
        if twice := merged.keys() & answer.keys():
            raise PluginError(f"two plugins give the loss term '{min(twice)}'; rename one of them")
        merged.update(answer)
    return merged


def step_units(micro: Sequence[Units], ranks: Ranks) -> dict[str, Tensor | float]:
    """Units of each term over a step's micro-batches and all processes, at least one."""
    totals = dict(micro[0])
    for units in micro[1:]:
        totals.update({name: totals.get(name, 0.0) + count for name, count in units.items()})
    if ranks.size > 1:
        counts = [torch.as_tensor(totals[name]).double() for name in sorted(totals)]
        totals = dict(zip(sorted(totals), ranks.sum(torch.stack(counts)), strict=True))
    return {
        name: units.clamp(min=1) if isinstance(units, Tensor) else max(units, 1.0)
        for name, units in totals.items()
    }


def means(terms: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
    """Each term's share of its mean over the step: its sum, by the units of the whole step."""
    if unknown := terms.keys() - units.keys():
        raise PluginError(f"loss term '{min(unknown)}' has no units: answer loss_units for it too")
    return {name: _times(term, 1 / units[name]) for name, term in terms.items()}


def weighted(losses: Mapping[str, Tensor], weights: Units) -> dict[str, Tensor]:
    """Each term times its weight (1 where none is given)."""
    return {name: _times(loss, weights.get(name, 1.0)) for name, loss in losses.items()}


def total(shares: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms."""
    return reduce(add, shares.values())


def _times(loss: Tensor, factor: Tensor | float) -> Tensor:
    return loss if isinstance(factor, float) and factor == 1.0 else loss * factor
