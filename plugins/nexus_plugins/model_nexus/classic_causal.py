"""The causal module of `classic`: one linear step of a learned graph, with noise in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import GatedWrite, Part

__all__ = ["ClassicCausal"]

EDGE_STD = 0.1
NOISE_STD = 0.1


class ClassicCausal(Part):
    """Read variables v of each token, apply one step `v A + noise` of a linear structural model.

    `A[i, j]` is the strength of the effect of variable i on variable j; the diagonal is zero.
    The noise (normal, with a learned scale for each variable) is drawn in training only.

    Shapes: B batch, T time, D model, n variables.

    Args:
        d_model: width D of the backbone states.
        n_variables: variables n; at least 2.

    Source: linear structural equation model in the form of NOTEARS (Zheng et al. 2018, eq. 2).
    """

    def __init__(self, d_model: int, n_variables: int = 16) -> None:
        super().__init__()
        self.read = nn.Linear(d_model, n_variables)
        self.edges = nn.Parameter(torch.randn(n_variables, n_variables) * EDGE_STD)
        self.noise_scale = nn.Parameter(torch.full((n_variables,), NOISE_STD))
        self.write = GatedWrite(n_variables, d_model)

    @property
    def adjacency(self) -> Tensor:
        """A, `(n, n)`, with a zero diagonal."""
        itself = torch.eye(len(self.edges), dtype=torch.bool, device=self.edges.device)
        return self.edges.masked_fill(itself, 0)

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Update states of any leading shape, each independently.

        Args:
            h: `(..., D)` normalized backbone states.
            document: unused: tokens do not interact.

        Returns:
            The update `(..., D)`, and `{"causal": reports}` with the `adjacency` `(n, n)` and the
            `variables` `(..., n)` that were read.
        """
        variables, adjacency = self.read(h), self.adjacency
        effects = variables @ adjacency
        if self.training:
            effects = effects + torch.randn_like(effects) * self.noise_scale
        reports = {"adjacency": adjacency, "variables": variables}
        return self.write(effects), {"causal": reports}
