"""A user-defined loss of the model's output and a batch's targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from nexus_core.bases import loss as bases
from nexus_core.batches import batch_size
from nexus_core.errors import ConfigError
from nexus_core.plugin import StateDict, hookimpl
from nexus_core.signatures import Lax
from nexus_plugins._shared.calls import Call, callee
from nexus_plugins.loss.criterion import Criterion, Given

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine
    from nexus_core.step import Step

__all__ = ["LossConfig", "LossPlugin"]

RESERVED = ("loss", "total_loss", "learning_rate")


class LossConfig(Call, bases.LossConfig):
    """The loss function or class, its units, and additional metrics."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"call": "torch.nn.functional:cross_entropy"}]}
    )

    target: str | int | None = Field(
        default=None,
        description="key or index of the targets in a batch; null: the second of a pair, or the "
        "entry target, targets, label, labels or y of a dict",
    )
    units: Lax[Call] | None = Field(
        default=None,
        description='what the loss sums over: "rows", or a function of the targets that counts '
        "units; null: the loss is a mean",
    )
    metrics: Lax[dict[str, Call]] = Field(
        default={},
        description="functions of output and targets to log next to the loss, by name",
        json_schema_extra={"resume": "ignored"},
    )

    @field_validator("metrics")
    @classmethod
    def _free_names(cls, metrics: dict[str, Call]) -> dict[str, Call]:
        if odd := [name for name in metrics if name in RESERVED or "/" in name or not name]:
            raise ValueError(f"a metric cannot be named '{odd[0]}' here; choose another name")
        return metrics


class LossPlugin(bases.Loss[LossConfig]):
    """Trains on a loss that you name: a function of `(output, target)`, or a callable class.

    A mean is weighted by the rows of its batch, or by its labels other than the function's
    `ignore_index` if it has one, so that the gradient of a step does not depend on how its rows are
    split. Any other loss is a sum, with `units` it sums over. A function whose second parameter is
    called `batch` gets the whole batch.
    """

    config_class = LossConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        target = self.config.target
        self._criterion = Criterion(self.name, self.config, target, self.config.units)
        self._metrics = {
            name: Given(callee(f"{self.name}.metrics.{name}", call, ("output", "target")), target)
            for name, call in self.config.metrics.items()
        }
        self._evaluated: Tensor | float = 0.0  # units of the current evaluation batch

    @hookimpl
    def on_build(self, engine: Engine) -> None:
        """Move the loss's own tensors to the device."""
        self._criterion.to(engine.device)

    def state_dict(self) -> StateDict:
        """The buffers of the loss, if any."""
        module = self._criterion.module
        buffers: StateDict = dict(module.state_dict()) if module is not None else {}
        return {"buffers": buffers} if buffers else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the buffers."""
        if self._criterion.module is not None:
            self._criterion.module.load_state_dict(state["buffers"])  # type: ignore[arg-type]

    def units(self, batch: Batch) -> Tensor | float:
        """The number of units in the batch."""
        return self._criterion.units(batch)

    @hookimpl
    def loss_units(  # type: ignore[override]
        self, batch: Batch, step: Step | None
    ) -> dict[str, Tensor | float]:
        """Count the units of the batch."""
        units = self.units(batch)
        if step is None:
            self._evaluated = units
        return {self.term: units}

    @hookimpl
    def loss_terms(  # type: ignore[override]
        self, engine: Engine, batch: Batch, output: Any, step: Step | None
    ) -> dict[str, Tensor]:
        """Sum the loss over the units of the batch, and log the metrics.

        Raises:
            ConfigError: the loss or a metric is not a number.
            DataError: the batch has no targets.
        """
        module = self._criterion.module
        if module is not None and module.training != engine.training:
            module.train(engine.training)
        with torch.no_grad():
            for name, function in self._metrics.items():
                engine.log(name, *_sum_of(function(batch, output), batch, function.function.key))
        units = self._evaluated if step is None else step.counts[step.place][self.term]
        return {self.term: self._criterion.sum(batch, output, units)}


def _sum_of(value: Any, batch: Batch, key: str) -> tuple[Tensor | float, float]:
    """The sum and units of a metric's return value.

    Raises:
        ConfigError: it is neither numbers nor a pair of sum and units.
    """
    if isinstance(value, tuple) and len(value) == 2:
        total, units = value
        return total, units
    if isinstance(value, Tensor) and value.numel() != 1:
        return value.sum(), float(value.numel())
    if isinstance(value, Tensor | int | float):
        rows = float(batch_size(batch)[0])
        return value.squeeze() * rows if isinstance(value, Tensor) else value * rows, rows
    raise ConfigError(
        f"{key}: got a {type(value).__name__}; return a mean over the rows of the batch, a number "
        "per row, or a pair (sum, count)"
    )
