"""Distillation: the model learns to predict like a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from nexus_core import ConfigError, Loss, LossConfig, hookimpl
from nexus_core.defaults import accepted
from nexus_core.signatures import Lax
from nexus_plugins._shared.calls import Call, callee
from nexus_plugins._shared.other_models import at_rest, forward_of
from nexus_plugins._shared.outputs import rows_of
from nexus_plugins._shared.token_losses import token_divergence

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["LossDistillConfig", "LossDistillPlugin", "divergence"]

_EXAMPLE: Any = {"teacher": {"call": "./teacher.py:build"}}


class LossDistillConfig(LossConfig):
    """Settings of distillation."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})
    teacher: Lax[Call] = Field(
        description="function or class that builds the teacher with its weights, and its arguments"
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="divides the logits of both models; the loss is multiplied by its square",
    )
    ignore_index: int = Field(default=-100, description="label of ignored positions")


class LossDistillPlugin(Loss[LossDistillConfig]):
    """Trains on the divergence of the model's next-token distribution from a teacher's.

    `KL(teacher || model)` in nats at positions whose label is not ignored; the teacher is frozen
    and in evaluation mode. With `loss_lm`, the weights of both set the mixture.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """

    config_class = LossDistillConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._make = callee("loss_distill.teacher", self.config.teacher)
        self._teacher: nn.Module | None = None

    @hookimpl
    def on_build(self, engine: Engine) -> None:
        """Build the teacher on the run's device.

        Raises:
            ConfigError: the call did not return a module.
        """
        with torch.random.fork_rng(devices=[]):
            teacher = self._make()
        if not isinstance(teacher, nn.Module):
            raise ConfigError(
                f"loss_distill.teacher: {self._make.place} returned a {type(teacher).__name__}; it "
                "must return a torch.nn.Module"
            )
        self._teacher = teacher.to(engine.device).requires_grad_(False).eval()

    def units(self, batch: Batch) -> Tensor:
        """The number of labels that are not ignored."""
        counted: Tensor = (batch["labels"] != self.config.ignore_index).sum()
        return counted

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `distill`."""
        assert self._teacher is not None
        with at_rest(self._teacher):
            if type(self._teacher) is type(engine.model):
                taught = forward_of(engine, self._teacher, batch, None)
            else:
                taught = self._called(batch)
        counted = batch["labels"] != self.config.ignore_index
        return {self.term: divergence(output, taught, counted, self.config.temperature)}

    def _called(self, batch: Batch) -> Any:
        """Call a teacher of another kind through its own `forward`."""
        assert self._teacher is not None
        given = accepted(self._teacher, batch)
        if "segment_ids" in batch and "segment_ids" not in given:
            raise ConfigError(
                "loss_distill: the batches are packed, but the teacher's forward takes no "
                "segment_ids to keep documents apart; pad instead of packing, or wrap the teacher"
            )
        return self._teacher(**{key: given[key] for key in given if key != "labels"})


def divergence(output: Any, taught: Any, counted: Tensor, temperature: float) -> Tensor:
    """`KL(teacher || model)` summed over positions, times the squared temperature.

    Args:
        output: the model's output: with `hidden` and `head_weight`, with `logits`, or logits
            `(B, T, V)`.
        taught: the teacher's output, likewise.
        counted: `(B, T)`, the positions to sum over.
        temperature: divides both logits.

    Raises:
        ConfigError: the vocabulary sizes differ.
    """
    (rows, head), (theirs, their_head) = rows_of(output), rows_of(taught)
    own, other = (len(h) if h is not None else r.shape[-1]
                  for r, h in ((rows, head), (theirs, their_head)))  # fmt: skip
    if own != other:
        raise ConfigError(
            f"loss_distill: the teacher has {other:,} ids, the model {own:,}; distil from a "
            "teacher with the model's tokenizer"
        )
    rows, theirs, weight = rows.flatten(0, -2), theirs.flatten(0, -2), counted.flatten()
    if rows.is_cpu:  # on other devices this would sync
        rows, theirs, weight = rows[weight], theirs[weight], weight[weight]
    nats = token_divergence(rows, head, theirs, their_head, temperature)
    return (nats * weight).sum() * temperature**2
