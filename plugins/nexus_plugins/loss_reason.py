"""The reasoner's loss: make up your mind about the rule to apply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from nexus_core.plugin import hookimpl
from nexus_plugins._shared.module_loss import ModuleLoss, PositionLossConfig, real_positions

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["LossReasonConfig", "LossReasonPlugin"]


class LossReasonConfig(PositionLossConfig):
    """Settings of the reasoner's loss."""

    weight: float = Field(0.05, description="factor of this term in the total loss")
    entropy_weight: float = Field(
        0.1, description="factor of the entropy (nats) of the rule distributions"
    )
    eps: float = Field(1e-10, gt=0, description="added to probabilities inside the logarithm")


class LossReasonPlugin(ModuleLoss[LossReasonConfig]):
    """Trains rule choices to be clear: `entropy_weight * entropy`, weighted by halting.

    The model reports `reason` `(B, T, K, R)`, a distribution over R rules at each of K steps, and
    `reason_halting` `(B, T, K)`. The mean is over positions and steps. Training also logs
    `reasoning/proof_length`, the expected number of steps.
    """

    def units(self, batch: Batch) -> Tensor:
        """The number of positions; padding does not count."""
        return real_positions(batch, self.config.ignore_index).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions of the mean over steps (so a unit is a position: K is fixed)."""
        reports = self.reports(output)
        rules, halting = reports["reason"], reports["reason_halting"]
        entropy = -(rules * (rules + self.config.eps).log()).sum(-1)
        each = self.config.entropy_weight * (halting * entropy).mean(-1)
        total: Tensor = (each * real_positions(batch, self.config.ignore_index)).sum()
        return total

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `reason`; in training also `reasoning/proof_length`."""
        if engine.training:
            halting = self.reports(output)["reason_halting"].detach()
            steps = torch.arange(1, halting.shape[-1] + 1, device=halting.device)
            length = (halting * steps).sum(-1)
            real = real_positions(batch, self.config.ignore_index)
            engine.log("reasoning/proof_length", (length * real).sum(), units=real.sum())
        return {self.term: self.loss(batch, output)}
