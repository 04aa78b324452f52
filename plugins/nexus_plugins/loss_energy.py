"""The energy module's loss: the cost of stopping early, and of predicting it wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from nexus_core.errors import ConfigError, hint_set
from nexus_core.plugin import hookimpl
from nexus_plugins._shared.module_loss import (
    ModuleLoss,
    PositionLossConfig,
    real_positions,
    refuse_idle,
)
from nexus_plugins._shared.token_losses import check_labels, token_divergence

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["LossEnergyConfig", "LossEnergyPlugin"]

STEEPEST = 5.0
"""The logarithm of the cost, in nats, from which the deviance is linear."""
CLASSIC = ("iteration_weight", "target_iterations")
"""Settings that only apply to the classic formula."""


class LossEnergyConfig(PositionLossConfig):
    """Settings of the energy module's loss."""

    weight: float = Field(
        default=0.1, description="weight of this term in the total loss; classic: default 0.05"
    )
    classic: bool = Field(default=False, description="the loss of the classic energy module")
    iteration_weight: float = Field(
        default=0.01, ge=0, description="weight of the distance to `target_iterations`; classic"
    )
    target_iterations: float = Field(
        default=5.0,
        ge=0,
        description="target for the average number of refinements per token; classic",
    )

    @model_validator(mode="before")
    @classmethod
    def _classical_weight(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"weight": 0.05, **given} if given.get("classic") else given

    @model_validator(mode="after")
    def _acts(self) -> LossEnergyConfig:
        refuse_idle(self, self.classic, () if self.classic else CLASSIC)
        return self


class LossEnergyPlugin(ModuleLoss[LossEnergyConfig]):
    """Trains every refinement to be usable as the last, and to predict the cost of stopping there.

    The model reports `energy`, a dict of `early` `(B, T, D)`, the final states if tokens had
    stopped after fewer refinements, and `foreseen` `(B, T)`, the logarithm of the predicted cost of
    that in nats. The cost is the divergence of what `early` predicts from what the model predicts,
    `KL(model || early)`: the expected nats lost by stopping, if the model is right. It has no
    gradient through what the model predicts; the backbone and the head, which both share, also
    learn to make stopping cheap. The loss is the cost, so that stopping early costs little, and the
    deviance of the predicted cost, which makes it the mean cost, with small costs as exact as large
    ones. Positions without a label add 0. If a refinement changes nothing, it learns to predict
    zero.

    With `classic` the dict is of `iterations` and `final_energy`, both `(B, T)`, and the loss is
    `final_energy + iteration_weight * |iterations - target_iterations|`.

    Training also logs `energy/avg_iterations`: the mean of `refinements`, the number actually made,
    if the model reports it, else of the expected `iterations`.
    """

    config_class = LossEnergyConfig

    def units(self, batch: Batch) -> Tensor:
        """The number of positions, without padding."""
        return real_positions(batch, self.config.ignore_index).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions."""
        energy = self.reports(output)["energy"]
        each = (
            self._classic(energy)
            if self.config.classic
            else self._of_refinements(batch, output, energy)
        )
        total: Tensor = (each * real_positions(batch, self.config.ignore_index)).sum()
        return total

    def _of_refinements(self, batch: Batch, output: Any, energy: Mapping[str, Tensor]) -> Tensor:
        if "early" not in energy:
            raise self._other_model("early", is_classic=True)
        skipped, head = self.config.ignore_index, output.head_weight
        labels = batch.get("labels", F.pad(batch["input_ids"][:, 1:], (0, 1), value=skipped))
        check_labels(labels, output.hidden)
        early, last = energy["early"].flatten(0, 1), output.hidden.flatten(0, 1)
        cost = token_divergence(early, head, last, head).view(labels.shape)
        counted: Tensor = labels != skipped
        return (cost + deviance(energy["foreseen"], cost.detach())) * counted

    def _classic(self, energy: Mapping[str, Tensor]) -> Tensor:
        if "final_energy" not in energy:
            raise self._other_model("final_energy", is_classic=False)
        distance = (energy["iterations"] - self.config.target_iterations).abs()
        return energy["final_energy"] + self.config.iteration_weight * distance

    def _other_model(self, missing: str, is_classic: bool) -> ConfigError:
        return ConfigError(
            f"loss_energy needs module_outputs['energy']['{missing}'], which the model does not "
            "report. Model and loss must both be classic, or neither: ",
            hint_set("model_nexus.classic", not is_classic),
            " or ",
            hint_set("loss_energy.classic", is_classic),
        )

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `energy`; in training also `energy/avg_iterations`."""
        if engine.training:
            energy = self.reports(output)["energy"]
            real = real_positions(batch, self.config.ignore_index)
            made = energy["refinements" if "refinements" in energy else "iterations"].detach()
            engine.log("energy/avg_iterations", (made * real).sum(), units=real.sum())
        return {self.term: self.loss(batch, output)}


def deviance(foreseen: Tensor, cost: Tensor) -> Tensor:
    """How far `exp(foreseen)` is from a cost of at least 0; least at its mean, as of a Poisson.

    Beyond `STEEPEST`, where no cost is in practice, it is linear, so that it cannot overflow.
    """
    capped = foreseen.clamp_max(STEEPEST)
    expected = capped.exp() * (1 + foreseen - capped)
    return expected - cost + torch.xlogy(cost, cost) - cost * foreseen
