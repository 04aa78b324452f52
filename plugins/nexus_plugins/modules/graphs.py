"""Random causal graphs, and data generated from them."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["Graph"]

HIDDEN = 16  # of the networks that make the data


class Graph:
    """Variables of a random graph, with observational and interventional samples.

    Values are standardized, so that variances do not reveal the order. A linear model has strengths
    of 0.5 to 2 of either sign and noise of variance 1; a model of networks has a random one for
    each variable.

    Args:
        draw: the random generator.
        variables: n.
        edges: number of edges, at most n (n - 1) / 2.
        kind: linear, or a network for each variable.
        observations: number of observational samples.
        interventions: interventional samples per variable.
    """

    def __init__(
        self,
        draw: Generator,
        variables: int = 10,
        edges: int = 20,
        kind: Literal["linear", "network"] = "linear",
        observations: int = 1000,
        interventions: int = 200,
    ) -> None:
        n, self._draw, self._kind = variables, draw, kind
        self._order = torch.randperm(n, generator=draw).tolist()
        pairs = torch.triu_indices(n, n, 1)
        causes, effects = pairs[:, torch.randperm(pairs.shape[1], generator=draw)[:edges]]
        in_order = torch.tensor(self._order)
        self.edges = torch.zeros(n, n, dtype=torch.bool)
        self.edges[in_order[causes], in_order[effects]] = True
        size = 0.5 + 1.5 * torch.rand(n, n, generator=draw)
        sign = torch.randn(n, n, generator=draw).sign()
        self._strengths = size * sign * self.edges
        self._first = torch.randn(n, n, HIDDEN, generator=draw)
        self._second = torch.randn(n, HIDDEN, generator=draw)

        observed = self._sample(observations)
        samples = [observed, *(self._sample(interventions, one) for one in range(n))]
        self.values = (torch.cat(samples) - observed.mean(0)) / observed.std(0)
        target = torch.arange(n).repeat_interleave(interventions)
        self.is_set = F.pad(F.one_hot(target, n).bool(), (0, 0, observations, 0))

    def rows(self, which: Tensor) -> dict[str, Tensor]:
        """The samples with these numbers, as a part of a batch for `loss_causal`."""
        return {"variables": self.values[which], "do": self.is_set[which], "edges": self.edges}

    def _sample(self, rows: int, target: int | None = None) -> Tensor:
        """Values `(rows, n)`; `target` is the variable that is intervened on."""
        values = torch.zeros(rows, len(self.edges))
        for one in self._order:
            noise = torch.randn(rows, generator=self._draw)
            values[:, one] = 2 * noise if one == target else self._effect(one, values, noise)
        return values

    def _effect(self, one: int, values: Tensor, noise: Tensor) -> Tensor:
        """A variable's values `(rows,)` by its equation."""
        if self._kind == "linear":
            return values @ self._strengths[:, one] + noise
        parents = self.edges[:, one]
        inner = (values * parents) @ self._first[one] / math.sqrt(max(1, int(parents.sum())))
        return (2 * inner).sigmoid() @ self._second[one] + noise / 2
