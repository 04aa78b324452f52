"""One optimizer step as an object, and its algebra: sums over units, divided by the step's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from nexus_core.batches import batch_size
from nexus_core.data import Micro
from nexus_core.errors import PluginError
from nexus_core.processes import Ranks, gather

__all__ = ["Numbers", "Step", "merge", "metric_name", "sum_units", "sum_units_exactly"]

Value = TypeVar("Value")
Numbers: TypeAlias = Mapping[str, Tensor | float]
"""A number for each loss term, on the device or on the host."""


@dataclass
class Step:
    """One optimizer step: what it is computed from, and what has come out of it so far.

    Attributes:
        number: of the step in the run, from 1.
        micro: its micro-batches, as `on_batch` left them; they wait on the host for their turn.
        turn: which of several optimizers the gradient is for; None: all of them.
        counts: the units of each micro-batch, by loss term.
        units: those of the whole step, over all processes, at least one where there are any.
        weights: the factor of each term.
        place: which micro-batch is being computed, from 0.
        again: the gradient is computed anew, at other weights (`optimizer_step`'s `again`).
        losses: the mean of each term over the step, as far as it is computed; this process's part
            of it where there are several (in cells the main one has it all).
        refused: 1.0 where the update is to leave no trace, else 0.0, on the device; None: nobody
            refuses steps in this run.
        applied: whether the weights have been updated.
        followed: how many plugins `on_step` has been called for.
        cells: how many each of its batches has, over all processes; none: the run is not in cells,
            else each of the micro-batches is one.
        passes: how often its gradient has been begun.
        turns: those of the step, in order, and `turns_done` how many of them have been.
    """

    number: int
    micro: tuple[Micro, ...]
    turn: str | None = None
    counts: tuple[Numbers, ...] = ()
    units: Numbers = field(default_factory=dict)
    weights: Numbers = field(default_factory=dict)
    place: int = 0
    again: bool = False
    losses: dict[str, Tensor] = field(default_factory=dict)
    refused: Tensor | None = None
    applied: bool = False
    turns: tuple[str | None, ...] = ()
    turns_done: int = 0
    followed: int = 0
    cells: tuple[int, ...] = ()
    passes: int = 0

    @property
    def is_done(self) -> bool:
        """Whether the update of every turn has been made."""
        return 0 < len(self.turns) == self.turns_done

    @property
    def is_last(self) -> bool:
        """Whether the micro-batch that is being computed is the step's last."""
        return self.place == len(self.micro) - 1

    @property
    def share(self) -> float:
        """Of the batch that the present micro-batch was cut from, the part of its rows; in cells
        the rows."""
        return self.micro[self.place].share

    @property
    def total(self) -> Tensor:
        """The weighted sum of the terms of this turn: the loss whose gradient was taken."""
        here = [n for n in self.losses if n in self.units]
        return reduce(add, (self.losses[name] * self.weights.get(name, 1.0) for name in here))

    def size(self) -> tuple[int, int]:
        """The rows and tokens of the step that this process alone trains on."""
        own = [batch_size(micro.batch) for micro in self.micro if not micro.borrowed]
        return sum(rows for rows, _ in own), sum(tokens for _, tokens in own)

    def shares_of(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each term of the present micro-batch adds to the loss of the step.

        Raises:
            PluginError: a term has no units, or there is no term.
        """
        if not terms:
            raise PluginError("no plugin gave a loss term for this batch: answer loss_terms")
        shares: dict[str, Tensor] = {}
        for name, term in terms.items():
            if name not in self.units:
                raise PluginError(f"loss term '{name}' has no units: answer loss_units for it too")
            units, weight = self.units[name], self.weights.get(name, 1.0)
            mean = term if isinstance(units, float) and units == 1.0 else term / units
            shares[name] = mean if isinstance(weight, float) and weight == 1.0 else mean * weight
            done = self.losses.get(name)
            self.losses[name] = mean.detach() if done is None else done + mean.detach()
        return shares


def metric_name(split: str, term: str) -> str:
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


def sum_units(counts: Sequence[Numbers], ranks: Ranks) -> dict[str, Tensor | float]:
    """Units of each term over a step's micro-batches and all processes; one in place of none."""
    totals = dict(counts[0])
    for units in counts[1:]:
        totals.update({name: totals.get(name, 0.0) + count for name, count in units.items()})
    if ranks.size > 1:
        names, double = sorted(totals), torch.float64
        device = next((n.device for n in totals.values() if isinstance(n, Tensor)), None)
        own = [
            n.to(device, double)
            if isinstance(n, Tensor)
            else torch.full((), n, dtype=double, device=device)  # made there, not copied
            for n in map(totals.__getitem__, names)
        ]
        totals = dict(zip(names, ranks.sum(torch.stack(own)).float(), strict=True))
    return {name: _at_least_some(count) for name, count in totals.items()}


def sum_units_exactly(counts: Sequence[Numbers], ranks: Ranks) -> dict[str, float]:
    """The same on the host, rounded once: equal for any number of processes."""
    own = [{name: float(count) for name, count in units.items()} for units in counts]
    everywhere = [units for part in gather(ranks, own) for units in part]
    names = sorted({name for units in everywhere for name in units})
    return {n: math.fsum(units.get(n, 0.0) for units in everywhere) or 1.0 for n in names}


def _at_least_some(count: Tensor | float) -> Tensor | float:
    """The count, or one where it is zero: units may be weights whose sum is below one."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, torch.ones_like(count), count)
    return count or 1.0
