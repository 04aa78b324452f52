"""One optimizer step as an object, and its arithmetic: sums over units, normalized per step."""

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
"""A number for each loss term, on the device or CPU."""


@dataclass
class Step:
    """One optimizer step: its inputs, and its results so far.

    Attributes:
        number: index of the step in the run, from 1.
        micro: its micro-batches after `on_batch`; they stay on the CPU until computed.
        turn: which of several optimizers the gradient is for; None: all of them.
        counts: units of each micro-batch, by loss term.
        units: units of the whole step over all ranks, at least one if there are any.
        weights: the weight of each term.
        place: index of the current micro-batch, from 0.
        again: the gradient is recomputed at other weights (`optimizer_step`'s `again`).
        losses: the mean of each term over the step, as computed so far; with several ranks this
            rank's part of it (in cells rank 0 has it all).
        refused: on the device, 1.0 if the update is to be skipped, else 0.0; None: no plugin skips
            steps in this run.
        applied: whether the weights have been updated.
        followed: number of plugins whose `on_step` was called.
        cells: number of cells of each batch, over all ranks; empty: the run is not in cells, else
            each micro-batch is a cell.
        passes: number of times its gradient was started.
        turns: the turns of the step, in order; `turns_done` is how many are done.
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
        """Whether the current micro-batch is the step's last."""
        return self.place == len(self.micro) - 1

    @property
    def share(self) -> float:
        """The current micro-batch's fraction of the rows of the batch it was cut from; in cells its
        number of rows."""
        return self.micro[self.place].share

    @property
    def total(self) -> Tensor:
        """The weighted sum of this turn's terms: the loss whose gradient was computed."""
        here = [n for n in self.losses if n in self.units]
        return reduce(add, (self.losses[name] * self.weights.get(name, 1.0) for name in here))

    def size(self) -> tuple[int, int]:
        """The rows and tokens of the step on this rank, not counting borrowed ones."""
        own = [batch_size(micro.batch) for micro in self.micro if not micro.borrowed]
        return sum(rows for rows, _ in own), sum(tokens for _, tokens in own)

    def shares_of(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each term of the current micro-batch contributes to the loss of the step.

        Raises:
            PluginError: a term has no units, or there are no terms.
        """
        if not terms:
            raise PluginError("no plugin returned a loss term for this batch: implement loss_terms")
        shares: dict[str, Tensor] = {}
        for name, term in terms.items():
            if name not in self.units:
                raise PluginError(f"loss term '{name}' has no units: return them in loss_units")
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
    """One dict of all plugins' terms; a term from two plugins is an error."""
    merged: dict[str, Value] = {}
    for answer in answers:
        if twice := merged.keys() & answer.keys():
            raise PluginError(f"two plugins return the loss term '{min(twice)}'; rename one")
        merged.update(answer)
    return merged


def sum_units(counts: Sequence[Numbers], ranks: Ranks) -> dict[str, Tensor | float]:
    """Units of each term over a step's micro-batches and all ranks; 1 if there are none."""
    totals = dict(counts[0])
    for units in counts[1:]:
        totals.update({name: totals.get(name, 0.0) + count for name, count in units.items()})
    if ranks.size > 1:
        names, double = sorted(totals), torch.float64
        device = next((n.device for n in totals.values() if isinstance(n, Tensor)), None)
        own = [
            n.to(device, double)
            if isinstance(n, Tensor)
            else torch.full((), n, dtype=double, device=device)  # created there, not copied
            for n in map(totals.__getitem__, names)
        ]
        totals = dict(zip(names, ranks.sum(torch.stack(own)).float(), strict=True))
    return {name: _at_least_some(count) for name, count in totals.items()}


def sum_units_exactly(counts: Sequence[Numbers], ranks: Ranks) -> dict[str, float]:
    """The same on the CPU, rounded once: equal for any number of ranks."""
    own = [{name: float(count) for name, count in units.items()} for units in counts]
    everywhere = [units for part in gather(ranks, own) for units in part]
    names = sorted({name for units in everywhere for name in units})
    return {n: math.fsum(units.get(n, 0.0) for units in everywhere) or 1.0 for n in names}


def _at_least_some(count: Tensor | float) -> Tensor | float:
    """The count, or one if it is zero: units may be weights whose sum is below one."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, torch.ones_like(count), count)
    return count or 1.0
