"""The causal module's loss: a sparse acyclic graph that explains the variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nexus_core.plugin import hookimpl
from nexus_plugins._shared.module_loss import ModuleLoss, PositionLossConfig, real_positions

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["LossCausalConfig", "LossCausalPlugin", "dag_constraint", "dag_log_det"]

MARGIN = 1.1  # factor between s and the largest possible eigenvalue
_CLASSIC = {
    "constraint": "exp",
    "dag_growth": 1.0,
    "sparsity_weight": 0.01,
    "reconstruction_weight": 0.0,
}


class LossCausalConfig(PositionLossConfig):
    """Settings of the causal module's loss."""

    weight: float = Field(default=0.05, description="weight of this term in the total loss")
    classic: bool = Field(
        default=False,
        description="the original formula: unnormalized squares, no noise or interventions, and "
        "other defaults (constraint exp, dag_growth 1, sparsity_weight 0.01, "
        "reconstruction_weight 0)",
    )
    constraint: Literal["logdet", "exp"] = Field(
        default="logdet",
        description="acyclicity constraint: DAGMA's log-determinant, or NOTEARS' exponential",
    )
    dag_weight: float = Field(default=1.0, ge=0, description="initial weight of the constraint")
    dag_growth: float = Field(
        default=1000.0,
        ge=1,
        description="factor by which that weight grows geometrically until the end",
    )
    sparsity_weight: float = Field(
        default=0.03, ge=0, description="weight of the sum of absolute edge strengths"
    )
    reconstruction_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of the variance of a position's variables that the graph does not "
        "explain, averaged over positions without padding",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_classic(cls, given: Any) -> Any:
        return {**_CLASSIC, **given} if isinstance(given, dict) and given.get("classic") else given


class LossCausalPlugin(ModuleLoss[LossCausalConfig]):
    """Trains a sparse acyclic graph in which each variable is explained by others.

    The model reports `causal`, a dict of `adjacency` A `(n, n)`, `variables` v `(..., n)`, what the
    graph predicts for them, `explained` `(..., n)`, and the `log_std` s `(n,)` of their noise. The
    loss of a position is the negative log-likelihood, the sum over variables of
    `(v - explained)^2 / (2 exp(2 s)) + s`; a variable marked by `do` `(..., n)` in the batch was
    intervened on, so its own equation does not count there. Once a step,
    `dag_weight * growth * h(A) + sparsity_weight * sum|A|` is added. If the batch has the
    variables, and the module reports what it `read` of the model's states, half the squared
    distance between them is added for each position: the model learns to represent them.

    An empty graph does not win by default: without edges, the variables' whole variance is
    unexplained. What can be recovered depends on the data: from observations of a linear Gaussian
    model, the graph up to its Markov equivalence class; with interventions on every variable, the
    graph itself. Training also logs `causal/dag_constraint`, h(A).

    Source: h is `-log det(s I - A * A) + n log s` of DAGMA (Bello et al. 2022, theorem 1), with s
        above any eigenvalue, or `tr(exp(A * A)) - n` of NOTEARS (Zheng et al. 2018). The likelihood
        is that of GOLEM-NV (Ng et al. 2020), with interventions as in DCDI (Brouillard et al.
        2020). Deviation: one optimizer and a rising factor, instead of an augmented Lagrangian or a
        central path.
    """

    config_class = LossCausalConfig
    api_version: ClassVar[str] = "1.2"
    _grown: Tensor | None = None
    """The current weight of the constraint, on the device, if it grows over the run."""

    def units(self, batch: Batch) -> Tensor | float:
        """The number of non-padding positions; one per micro-batch without reconstruction."""
        if not self.config.reconstruction_weight:
            return 1.0
        return self._real(batch).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The graph penalty, once per unit, plus the summed negative log-likelihood."""
        graph: Mapping[str, Tensor] = self.reports(output)["causal"]
        return self._term(batch, graph, self._constraint(graph["adjacency"]))

    @hookimpl
    def loss_units(self, engine: Engine, batch: Batch) -> dict[str, Tensor | float]:
        """Count the units, and update the weight of the constraint."""
        if engine.horizon is not None and self.config.dag_growth != 1:
            growth = self.config.dag_growth ** engine.horizon.progress(engine.state)
            dtype = torch.promote_types(engine.parameters()[0].dtype, torch.float32)
            weight = self.config.dag_weight * growth
            self._grown = torch.full((), weight, dtype=dtype, device=engine.device)
        return super().loss_units(engine, batch)

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `causal`; in training also `causal/dag_constraint`."""
        graph: Mapping[str, Tensor] = self.reports(output)["causal"]
        constraint = self._constraint(graph["adjacency"])
        if engine.training:
            engine.log("causal/dag_constraint", constraint.detach())
        return {self.term: self._term(batch, graph, constraint)}

    def _constraint(self, adjacency: Tensor) -> Tensor:
        return (dag_log_det if self.config.constraint == "logdet" else dag_constraint)(adjacency)

    def _real(self, batch: Batch) -> Tensor:
        if "input_ids" in batch:
            return real_positions(batch, self.config.ignore_index)
        return torch.ones_like(batch["variables"][..., 0], dtype=torch.bool)

    def _term(self, batch: Batch, graph: Mapping[str, Tensor], constraint: Tensor) -> Tensor:
        config, adjacency = self.config, graph["adjacency"]
        once = (config.dag_weight if self._grown is None else self._grown) * constraint
        once = once + config.sparsity_weight * adjacency.abs().sum()
        if not config.reconstruction_weight:
            return once
        real = self._real(batch)
        misfit = _squares(graph) if config.classic else _surprise(batch, graph)
        return once * real.sum() + config.reconstruction_weight * (misfit * real).sum()


def _squares(graph: Mapping[str, Tensor]) -> Tensor:
    """Half the squared distance of the variables of each position from `v A`."""
    adjacency = graph["adjacency"]
    given = graph["variables"].detach().to(adjacency.dtype)
    with torch.autocast(given.device.type, enabled=False):
        missed: Tensor = given - given @ adjacency
    return missed.square().sum(-1) / 2


def _surprise(batch: Batch, graph: Mapping[str, Tensor]) -> Tensor:
    """The part of each position that the graph does not explain, and that was not read."""
    variables, log_std = graph["variables"], graph["log_std"]
    missed = (variables - graph["explained"]).square()
    each = missed * (-2 * log_std).exp() / 2 + log_std
    if "do" in batch:
        each = each.where(~batch["do"].bool(), 0)
    if "variables" in batch and "read" in graph:
        each = each + (variables - graph["read"]).square() / 2
    return each.sum(-1)


def dag_constraint(adjacency: Tensor) -> Tensor:
    """`tr(exp(A * A)) - n`: 0 if the graph of A is acyclic, else positive.

    Args:
        adjacency: A `(n, n)`; in types narrower than float32 it is computed in float32.

    Returns:
        A 0-d tensor with its autograd graph.

    Source: Zheng et al. 2018, "DAGs with NO TEARS", theorem 1.
    """
    wide = adjacency.to(torch.promote_types(adjacency.dtype, torch.float32))
    with torch.autocast(wide.device.type, enabled=False):
        walks: Tensor = torch.linalg.matrix_exp(wide.square())
        return walks.trace() - len(wide)


def dag_log_det(adjacency: Tensor) -> Tensor:
    """`-log det(s I - A * A) + n log s`: 0 if the graph of A is acyclic, else positive.

    s is 1, or larger if an eigenvalue of A * A could come close to it, so that it exists for any A.

    Args:
        adjacency: A `(n, n)`; in types narrower than float32 it is computed in float32.

    Returns:
        A 0-d tensor with its autograd graph.

    Source: Bello et al. 2022, "DAGMA", definition 2 and theorem 1.
    """
    wide = adjacency.to(torch.promote_types(adjacency.dtype, torch.float32))
    with torch.autocast(wide.device.type, enabled=False):
        squares = wide.square()
        rows, columns = squares.sum(1).max(), squares.sum(0).max()
        scale = (MARGIN * torch.minimum(rows, columns)).detach().clamp_min(1)
        inner = scale * torch.eye(len(wide), dtype=wide.dtype, device=wide.device) - squares
        logarithm: Tensor = torch.linalg.slogdet(inner).logabsdet
        return len(wide) * scale.log() - logarithm
