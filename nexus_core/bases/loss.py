"""The base class of loss terms: a number of units, and a sum over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from nexus_core.plugin import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["Loss", "LossConfig"]


class LossConfig(PluginConfig):
    """Settings shared by all loss terms."""

    weight: float = Field(default=1.0, description="factor of this term in the total loss")


LossConfigT = TypeVar("LossConfigT", bound=LossConfig)


class Loss(Plugin[LossConfigT]):
    """One term of the loss, given by the number of units in a batch and the sum over them.

    The engine divides by the units of the whole step (all micro-batches, all processes), so the
    gradient does not depend on how a step is split. `LossSizePlugin` is the term `size`, logged as
    `train/size_loss`.
    """

    term: ClassVar[str] = "loss"
    weight: float  # the current factor; starts at the config's and may be scheduled

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "term" not in cls.__dict__:
            cls.term = cls.name.removeprefix("loss_")

    def _set_up(self) -> None:
        self.weight = self.config.weight

    def units(self, batch: Batch) -> Tensor | float:
        """The number of units (labels, positions, ...) in the batch: a number, or a 0-d tensor."""
        raise NotImplementedError(f"{type(self).__name__}.units")

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The 0-d sum of this term over the batch's units, given the `output` of `forward`."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def validation_loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum that evaluation reports; override it if it differs from the training loss."""
        return self.loss(batch, output)

    @hookimpl
    def loss_units(self, engine: Engine, batch: Batch) -> dict[str, Tensor | float]:
        return {self.term: self.units(batch)}

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        measure = self.loss if engine.training else self.validation_loss
        return {self.term: measure(batch, output)}

    @hookimpl
    def loss_weight(self, engine: Engine) -> dict[str, float]:
        return {self.term: self.weight}
