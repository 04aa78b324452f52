"""The causal module's loss: a sparse graph without cycles, that explains the variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from nexus_core.plugin import hookimpl
from nexus_plugins._shared.module_loss import ModuleLoss, PositionLossConfig, real_positions

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["LossCausalConfig", "LossCausalPlugin", "dag_constraint"]


class LossCausalConfig(PositionLossConfig):
    """Settings of the causal module's loss."""

    weight: float = Field(0.05, description="factor of this term in the total loss")
    dag_weight: float = Field(1.0, ge=0, description="factor of the acyclicity constraint")
    sparsity_weight: float = Field(
        0.01, ge=0, description="factor of the sum of absolute edge strengths"
    )
    reconstruction_weight: float = Field(
        0.0,
        ge=0,
        description="factor of half the squared distance between the variables of a position and "
        "what the graph makes of them, on average over positions; without padding",
    )


class LossCausalPlugin(ModuleLoss[LossCausalConfig]):
    """Trains on `dag_weight * h(A) + sparsity_weight * sum|A|`, once a step.

    The model reports `causal`, a dict of the `adjacency` A `(n, n)` and the `variables` v
    `(B, T, n)`. With a `reconstruction_weight` the mean over positions of `|v - v A|^2 / 2` is
    added; the variables are taken as given there, since reading zeros would explain them best.
    Training also logs `causal/dag_constraint`, h(A).

    Source: Zheng et al. 2018 (NOTEARS), with fixed weights in place of an augmented Lagrangian.
    """

    def units(self, batch: Batch) -> Tensor | float:
        """One a micro-batch; with a reconstruction, its positions. Padding does not count."""
        if not self.config.reconstruction_weight:
            return 1.0
        return real_positions(batch, self.config.ignore_index).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """What the graph alone costs, once a unit, and the sum of what it does not explain."""
        graph: Mapping[str, Tensor] = self.reports(output)["causal"]
        return self._term(batch, graph, dag_constraint(graph["adjacency"]))

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `causal`; in training also `causal/dag_constraint`."""
        graph: Mapping[str, Tensor] = self.reports(output)["causal"]
        constraint = dag_constraint(graph["adjacency"])
        if engine.training:
            engine.log("causal/dag_constraint", constraint.detach())
        return {self.term: self._term(batch, graph, constraint)}

    def _term(self, batch: Batch, graph: Mapping[str, Tensor], constraint: Tensor) -> Tensor:
        adjacency = graph["adjacency"]
        once = self.config.dag_weight * constraint
        once = once + self.config.sparsity_weight * adjacency.abs().sum()
        if not self.config.reconstruction_weight:
            return once
        given = graph["variables"].detach().to(adjacency.dtype)
        with torch.autocast(given.device.type, enabled=False):
            missed = given - given @ adjacency
        real = real_positions(batch, self.config.ignore_index)
        misfit = (missed.square().sum(-1) * real).sum() / 2
        return once * real.sum() + self.config.reconstruction_weight * misfit


def dag_constraint(adjacency: Tensor) -> Tensor:
    """`tr(exp(A * A)) - n`: 0 if the graph of A has no cycle, else positive.

    Args:
        adjacency: A `(n, n)`; in types narrower than float32 it is computed in float32.

    Returns:
        A tensor without dimensions, with its graph.

    Source: Zheng et al. 2018, "DAGs with NO TEARS", theorem 1.
    """
    wide = adjacency.to(torch.promote_types(adjacency.dtype, torch.float32))
    with torch.autocast(wide.device.type, enabled=False):
        walks: Tensor = torch.linalg.matrix_exp(wide.square())
        return walks.trace() - len(wide)
