"""The base class of losses of one module's reports, and the positions they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field

from nexus_core.bases.loss import Loss, LossConfig
from nexus_core.errors import ConfigError, hint_leave_out, hint_set
from nexus_core.plugin import hookimpl
from nexus_plugins._shared.outputs import described, module_outputs

if TYPE_CHECKING:
    from torch import Tensor

    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["ModuleLoss", "PositionLossConfig", "real_positions", "refuse_idle"]


class PositionLossConfig(LossConfig):
    """Settings shared by every loss over positions."""

    ignore_index: int = Field(default=-100, description="label of ignored positions")


def refuse_idle(config: LossConfig, is_classic: bool, idle: Sequence[str]) -> None:
    """Reject non-default settings of the formula that is not in use.

    Raises:
        ValueError: one of them is not.
    """
    fields = type(config).model_fields
    changed = [name for name in idle if getattr(config, name) != fields[name].default]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} has no effect with classic={str(is_classic).lower()}; remove "
            f"it, or set classic to {str(not is_classic).lower()}"
        )


LossConfigT = TypeVar("LossConfigT", bound=LossConfig)


class ModuleLoss(Loss[LossConfigT]):
    """The loss of what the model's module of the same name reports: `loss_world` reads `world`.

    The model's output has `module_outputs`, a dict with that key: it is an object or a dict with
    that name, or a tuple such as `(logits, {"module_outputs": {...}})`. A model that has
    `active_modules`, a tuple of such names, is rejected before the first step if the module is not
    among them.
    """

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Reject a model that declares that it lacks the module (ConfigError)."""
        if self.term not in getattr(engine.model, "active_modules", (self.term,)):
            raise self._no_module(f"a model with the modules {engine.model.active_modules}")

    def reports(self, output: Any) -> Mapping[str, Any]:
        """The `module_outputs`, if the module is among them.

        Raises:
            ConfigError: it is not.
        """
        reports = module_outputs(output)
        if self.term not in reports:
            found = ", ".join(map(repr, reports)) or "none"
            raise self._no_module(f"{described(output)}, with module_outputs: {found}")
        return reports

    def _no_module(self, got: str) -> ConfigError:
        return ConfigError(
            f"{self.name} needs a model whose output has module_outputs['{self.term}'] (an object "
            'or a dict with that name, or (logits, {"module_outputs": {...}})); got '
            f"{got}. Enable the module with ",
            hint_set(f"model_nexus.{self.term}", True),
            ", or remove the loss: ",
            hint_leave_out(self.name),
        )


def real_positions(batch: Batch, ignore_index: int) -> Tensor:
    """The mask of tokens that predict or are predicted, as opposed to padding.

    Args:
        batch: has `input_ids` and, if some are ignored, `labels`, both `(B, T)`.
        ignore_index: the label of positions that predict nothing.

    Returns:
        `(B, T)` bool; all True if there are no labels.
    """
    if "labels" not in batch:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    predicts: Tensor = batch["labels"] != ignore_index
    return predicts | F.pad(predicts[:, :-1], (1, 0))
