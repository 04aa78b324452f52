"""The energy module's loss: low valleys, reached in about so many refinements."""

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

__all__ = ["LossEnergyConfig", "LossEnergyPlugin"]

NO_MODULE = (
    "loss_energy needs a model whose output has module_outputs['energy']; got one without. Switch "
    "the module on with --set model_nexus.energy=true, or leave the loss out with "
    "--plugins no:loss_energy"
)


class LossEnergyConfig(LossConfig):
    """Settings of the energy module's loss."""

    weight: float = Field(0.05, description="factor of this term in the total loss")
    iteration_weight: float = Field(
        0.01, ge=0, description="factor of the distance to `target_iterations`"
    )
    target_iterations: float = Field(
        5.0, ge=0, description="refinements that a token should take on average"
    )
    ignore_index: int = Field(-100, description="label of positions that do not count")


class LossEnergyPlugin(Loss[LossEnergyConfig]):
    """Trains on `final_energy + iteration_weight * |iterations - target_iterations|`.

    The model reports `energy`, a dict of `final_energy` and `iterations`, both `(B, T)`. The mean
    is over positions. Training also logs `energy/avg_iterations`: of `refinements`, the refinements
    really made, where the model reports them, else of the expected `iterations`.
    """

    def units(self, batch: Batch) -> Tensor:
        """The number of positions; padding is none."""
        return self._real(batch).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions."""
        energy = _report(output)
        distance = (energy["iterations"] - self.config.target_iterations).abs()
        each = energy["final_energy"] + self.config.iteration_weight * distance
        return (each * self._real(batch)).sum()

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Refuse a model that says it has no energy module."""
        if "energy" not in getattr(engine.model, "active_modules", ("energy",)):
            raise ConfigError(NO_MODULE)

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `energy`; in training also `energy/avg_iterations`."""
        if engine.training:
            energy, real = _report(output), self._real(batch)
            made = energy.get("refinements", energy["iterations"].detach())
            engine.log("energy/avg_iterations", (made * real).sum(), units=real.sum())
        return {self.term: self.loss(batch, output)}

    def _real(self, batch: Batch) -> Tensor:
        """(B, T) whether a token predicts or is predicted; padding is neither."""
        if "labels" not in batch:
            return torch.ones_like(batch["input_ids"], dtype=torch.bool)
        predicts = batch["labels"] != self.config.ignore_index
        result: Tensor = predicts | F.pad(predicts[:, :-1], (1, 0))
        return result


def _report(output: Any) -> Mapping[str, Tensor]:
    reports: Mapping[str, Any] = getattr(output, "module_outputs", {})
    if "energy" not in reports:
        raise ConfigError(NO_MODULE)
    report: Mapping[str, Tensor] = reports["energy"]
    return report
