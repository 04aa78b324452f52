"""The measures specific to each puzzle, besides its cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_core.batches import Batch
from nexus_plugins._shared.outputs import module_outputs, rows_of

__all__ = [
    "Depth",
    "Edges",
    "Hops",
    "Look",
    "Seen",
    "edges_right",
    "looks",
    "right_by_hops",
    "spearman",
]

Seen: TypeAlias = Sequence[tuple[Batch, Any]]
"""Parts of batches, each with what a model made of it."""
STRENGTH = 0.1
"""An edge of at least this strength counts as found."""


@dataclass(frozen=True)
class Depth:
    """How often the tokens of a row are refined, and how noisy the row is."""

    place: str
    level: Tensor
    """(B,)"""
    refinements: Tensor
    """(B,) on average over the row."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Refinements, and their rank correlation with the level of noise, if there is one."""
        correlation = spearman(self.refinements, self.level)
        known = {} if math.isnan(correlation) else {"rank_correlation": correlation}
        return {"refinements": self.refinements.mean().item(), **known}

    @property
    def summary(self) -> str:
        """The measure in words."""
        order = self.level.argsort()
        third = max(1, len(order) // 3)
        easy, hard = (self.refinements[part].mean() for part in (order[:third], order[-third:]))
        return f"refinements {easy:.1f} where there is little noise, {hard:.1f} where there is much"


@dataclass(frozen=True)
class Hops:
    """The share of right answers by the number of hops."""

    place: str
    right: tuple[float, ...]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Accuracies, by the number of hops."""
        return {f"right_{number}": share for number, share in enumerate(self.right, 1)}

    @property
    def summary(self) -> str:
        """The measure in words."""
        return f"{', '.join(f'{share:.0%}' for share in self.right)} right after 1, 2, ... hops"


@dataclass(frozen=True)
class Edges:
    """The learned strengths and the true edges."""

    place: str
    edges: Tensor
    """(n, n) bool"""
    strengths: Tensor
    """(n, n)"""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The share of the edges that was found, and pairs whose edge is wrong in any respect."""
        found, wrong = edges_right(self.edges, self.strengths, STRENGTH)
        return {"edges_found": found, "pairs_wrong": float(wrong)}

    @property
    def summary(self) -> str:
        """The measure in words."""
        count = len(self.edges) * (len(self.edges) - 1) // 2
        found, wrong = self.metrics.values()
        return f"{found:.0%} of the edges found, {wrong:.0f} of {count} pairs wrong"


Look: TypeAlias = Depth | Hops | Edges


def looks(place: str, seen: Seen) -> Iterator[Look]:
    """The measures that apply to a contender, by what its batches and its model have.

    Args:
        place: `puzzle/contender`.
        seen: its parts of an evaluation, each with the model's output.
    """
    first, output = seen[0]
    reports = module_outputs(output)
    if "level" in first and "energy" in reports:
        made = [module_outputs(out)["energy"]["refinements"].mean(1) for _, out in seen]
        level = torch.cat([part["level"][:, 0] for part, _ in seen])
        yield Depth(place, level.cpu(), torch.cat(made).cpu())
    if "hops" in first:
        asked = torch.cat([part["hops"] for part, _ in seen])
        hits = [_logits(out).argmax(-1) == part["labels"] for part, out in seen]
        yield Hops(place, right_by_hops(asked, torch.cat(hits)))
    if "edges" in first and "causal" in reports:
        strengths = reports["causal"]["adjacency"].detach().abs()
        yield Edges(place, first["edges"][0].cpu(), strengths.cpu())


def right_by_hops(asked: Tensor, right: Tensor) -> tuple[float, ...]:
    """The share of right answers after 1, 2, ... hops.

    Args:
        asked: hops of each question; 0: not a question.
        right: of the same shape, whether its answer is right.
    """
    most = int(asked.max())
    return tuple(right[asked == number].double().mean().item() for number in range(1, most + 1))


def edges_right(edges: Tensor, strengths: Tensor, least: float) -> tuple[float, int]:
    """The share of the edges that was found, and the pairs whose edge is wrong in any respect.

    Args:
        edges: `(n, n)` bool, the true ones.
        strengths: `(n, n)`, the learned ones.
        least: an edge of at least this strength counts as found.
    """
    found = strengths >= least
    wrong = (found != edges) | (found != edges).T
    return (found & edges).sum().item() / edges.sum().item(), int(wrong.triu(1).sum())


def spearman(first: Tensor, second: Tensor) -> float:
    """The rank correlation of two `(N,)`; equal values share the mean of their ranks.

    Returns:
        From -1 to 1; NaN if all values of one are equal.
    """
    return torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1].item()


def _logits(output: Any) -> Tensor:
    rows, head = rows_of(output)
    return rows if head is None else F.linear(rows, head)


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - counts / 2)[which]
    return ranks.double()
