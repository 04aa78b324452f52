"""The reasoner's loss: make up your mind about the rule to apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus_core.errors import ConfigError
from nexus_core.plugin import hookimpl
from nexus_parts.loss import Loss, LossConfig

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.loader import Batch

__all__ = ["LossReasonConfig", "LossReasonPlugin"]

NO_MODULE = (
    "loss_reason needs a model whose output has module_outputs['reason']; got one without. Switch "
    "the module on with --set model_nexus.reason=true, or leave the loss out with "
    "--plugins no:loss_reason"
)


class LossReasonConfig(LossConfig):
    """Settings of the reasoner's loss."""

    weight: float = Field(0.05, description="factor of this term in the total loss")
    entropy_weight: float = Field(
        0.1, description="factor of the entropy (nats) of the rule distributions"
    )
    eps: float = Field(1e-10, gt=0, description="added to probabilities inside the logarithm")
    ignore_index: int = Field(-100, description="label of positions that do not count")


class LossReasonPlugin(Loss[LossReasonConfig]):
    """Trains rule choices to be clear: `entropy_weight * entropy`, weighted by halting.

    The model reports `reason` `(B, T, K, R)`, a distribution over R rules at each of K steps, and
    `reason_halting` `(B, T, K)`. The mean is over positions and steps. Training also logs
    `reasoning/proof_length`, the expected number of steps.
    """

    def units(self, batch: Batch) -> Tensor:
        """The number of positions; padding is none."""
        return self._real(batch).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions of the mean over steps (so a unit is a position: K is fixed)."""
        reports = _reports(output)
        rules, halting = reports["reason"], reports["reason_halting"]
        entropy = -(rules * (rules + self.config.eps).log()).sum(-1)
        each = (halting * entropy).mean(-1)
        return self.config.entropy_weight * (each * self._real(batch)).sum()

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Refuse a model that says it has no reasoner."""
        if "reason" not in getattr(engine.model, "active_modules", ("reason",)):
            raise ConfigError(NO_MODULE)

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `reason`; in training also `reasoning/proof_length`."""
        if engine.training:
            halting = _reports(output)["reason_halting"].detach()
            steps = torch.arange(1, halting.shape[-1] + 1, device=halting.device)
            length = (halting * steps).sum(-1)
            real = self._real(batch)
            engine.log("reasoning/proof_length", (length * real).sum(), units=real.sum())
        return {self.term: self.loss(batch, output)}

    def _real(self, batch: Batch) -> Tensor:
        """(B, T) whether a token predicts or is predicted; padding is neither."""
        if "labels" not in batch:
            return torch.ones_like(batch["input_ids"], dtype=torch.bool)
        predicts = batch["labels"] != self.config.ignore_index
        result: Tensor = predicts | F.pad(predicts[:, :-1], (1, 0))
        return result


def _reports(output: Any) -> Mapping[str, Tensor]:
    reports: Mapping[str, Any] = getattr(output, "module_outputs", {})
    if "reason" not in reports:
        raise ConfigError(NO_MODULE)
    return reports
