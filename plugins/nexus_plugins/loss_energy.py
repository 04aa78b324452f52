"""The energy module's loss: low valleys, reached in about so many refinements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor

from nexus_core.plugin import hookimpl
from nexus_plugins._shared.module_loss import ModuleLoss, PositionLossConfig, real_positions

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["LossEnergyConfig", "LossEnergyPlugin"]


class LossEnergyConfig(PositionLossConfig):
    """Settings of the energy module's loss."""

    weight: float = Field(0.05, description="factor of this term in the total loss")
    iteration_weight: float = Field(
        0.01, ge=0, description="factor of the distance to `target_iterations`"
    )
    target_iterations: float = Field(
        5.0, ge=0, description="refinements that a token should take on average"
    )


class LossEnergyPlugin(ModuleLoss[LossEnergyConfig]):
    """Trains on `final_energy + iteration_weight * |iterations - target_iterations|`.

    The model reports `energy`, a dict of `final_energy` and `iterations`, both `(B, T)`. The mean
    is over positions. Training also logs `energy/avg_iterations`: of `refinements`, the refinements
    really made, where the model reports them, else of the expected `iterations`.
    """

    def units(self, batch: Batch) -> Tensor:
        """The number of positions; padding does not count."""
        return real_positions(batch, self.config.ignore_index).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions."""
        energy = self.reports(output)["energy"]
        distance = (energy["iterations"] - self.config.target_iterations).abs()
        each = energy["final_energy"] + self.config.iteration_weight * distance
        total: Tensor = (each * real_positions(batch, self.config.ignore_index)).sum()
        return total

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `energy`; in training also `energy/avg_iterations`."""
        if engine.training:
            energy = self.reports(output)["energy"]
            real = real_positions(batch, self.config.ignore_index)
            made = energy.get("refinements", energy["iterations"].detach())
            engine.log("energy/avg_iterations", (made * real).sum(), units=real.sum())
        return {self.term: self.loss(batch, output)}
