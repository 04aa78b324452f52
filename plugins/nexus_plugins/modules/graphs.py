"""Random causal graphs, and data generated from them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor

__all__ = ["Graph"]

HIDDEN = 16  # of the networks that make the data


class Graph:
    """Variables of a random graph, with observational and interventional samples.

    Values are standardized, so that variances do not reveal the order. A linear model has strengths
    of 0.5 to 2 of either sign and noise of variance 1; a model of networks has a random one for
    each variable.

    Args:
        draw: where chance comes from.
        variables: n.
        edges: that there are, of n (n - 1) / 2 at most.
        kind: linear, or a network for each variable.
        observed: number of observational samples.
        by_hand: interventional samples per variable; 0: none.
    """

    def __init__(
        self,
        draw: Generator,
        variables: int = 10,
        edges: int = 20,
        kind: Literal["linear", "network"] = "linear",
        observed: int = 1000,
        by_hand: int = 200,
    ) -> None:
        n, self._draw, self._kind = variables, draw, kind
        self._order = torch.randperm(n, generator=draw).tolist()
        pairs = torch.triu_indices(n, n, 1)
        chosen = pairs[:, torch.randperm(pairs.shape[1], generator=draw)[:edges]]
        places = torch.tensor(self._order)
        self.edges = torch.zeros(n, n, dtype=torch.bool)
        self.edges[places[chosen[0]], places[chosen[1]]] = True
        size = 0.5 + 1.5 * torch.rand(n, n, generator=draw)
        sign = torch.randn(n, n, generator=draw).sign()
        self._strengths = size * sign * self.edges
        self._first = torch.randn(n, n, HIDDEN, generator=draw)
        self._second = torch.randn(n, HIDDEN, generator=draw)
        self.values, self.is_set = self._data(observed, by_hand)

    def rows(self, which: Tensor) -> dict[str, Tensor]:
        """Some of the values by their numbers, as the causal module's loss takes them."""
        return {"variables": self.values[which], "do": self.is_set[which], "edges": self.edges}

    def _data(self, observed: int, by_hand: int) -> tuple[Tensor, Tensor]:
        """Standardized values `(N, n)`, and which of them were intervened on."""
        seen = self._sample(observed)
        parts, marks = [seen], [torch.zeros(seen.shape, dtype=torch.bool)]
        for one in range(len(self.edges)) if by_hand else ():
            parts.append(self._sample(by_hand, one))
            marks.append(torch.zeros(parts[-1].shape, dtype=torch.bool))
            marks[-1][:, one] = True
        return (torch.cat(parts) - seen.mean(0)) / seen.std(0), torch.cat(marks)

    def _sample(self, rows: int, by_hand: int | None = None) -> Tensor:
        """Values `(rows, n)`; `by_hand` is the variable that is set."""
        values = torch.zeros(rows, len(self.edges))
        for one in self._order:
            noise = torch.randn(rows, generator=self._draw)
            if one == by_hand:
                values[:, one] = 2 * noise
            elif self._kind == "linear":
                values[:, one] = values @ self._strengths[:, one] + noise
            else:
                parents = self.edges[:, one]
                inner = (
                    (values * parents) @ self._first[one] / math.sqrt(max(1, int(parents.sum())))
                )
                values[:, one] = (2 * inner).sigmoid() @ self._second[one] + noise / 2
        return values
