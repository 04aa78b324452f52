"""The world-model loss: predict the latents of tokens to come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus_core.plugin import hookimpl
from nexus_plugins._shared.module_loss import ModuleLoss, PositionLossConfig, real_positions

if TYPE_CHECKING:
    from nexus_core import Engine, Step
    from nexus_core.batches import Batch

__all__ = ["LossWorldConfig", "LossWorldPlugin"]


class LossWorldConfig(PositionLossConfig):
    """Settings of the world-model loss and of its target encoder."""

    weight: float = Field(0.1, description="factor of this term in the total loss")
    variance_weight: float = Field(0.1, ge=0, description="factor of the hinge on the variance")
    variance_floor: float = Field(
        0.1, ge=0, description="variance of a prediction over its dimensions where the hinge begins"
    )
    decay: float = Field(
        0.996, ge=0, le=1, description="part of the target encoder kept at each optimizer step"
    )
    decay_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: the decay rises to 1 by the end of the run"
    )


class LossWorldPlugin(ModuleLoss[LossWorldConfig]):
    """Trains latents to foretell later ones, and moves the target encoder after each step.

    The model reports `world` and `world_targets` `(B, T, L, d)` and `world_mask` `(B, T, L)`, true
    where a target exists, and may have `update_world_target(decay)`. A position counts if the
    token after it is there and of the same document; its loss is the mean over its targets of
    `mean((world - world_targets)^2) + variance_weight * relu(variance_floor - variance)`, the
    variance (population) being that of the prediction over d. Without `world_targets` there is
    only the second part.

    The hinge keeps one prediction from being the same number in every dimension. It is no defence
    against collapse: latents that are equal for all tokens cost nothing. What works against that
    is that the targets have no gradient and follow slowly, and have mean 0 and variance 1.

    Source: VICReg (Bardes et al. 2022) has a hinge on the standard deviation over the batch, for
        each dimension. That is no sum over positions, so the gradient of a step would depend on
        its split into micro-batches; here it is on the variance over the latent dimension. The
        cosine decay is that of BYOL (Grill et al. 2020).
    """

    api_version: ClassVar[str] = "1.2"

    def units(self, batch: Batch) -> Tensor:
        """The number of positions with a next token in the same document."""
        return self._foretelling(batch).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions of the mean over their targets."""
        reports = self.reports(output)
        predictions = reports["world"]
        predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        variance = predictions.var(-1, correction=0)
        each = self.config.variance_weight * F.relu(self.config.variance_floor - variance)
        mask = self._foretelling(batch).unsqueeze(-1).expand(variance.shape)
        if "world_targets" in reports:
            each = each + (predictions - reports["world_targets"]).square().mean(-1)
            mask = mask & reports.get("world_mask", mask)
        share = mask / mask.sum(-1, keepdim=True).clamp(min=1)
        return (each * share).sum()

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        """Let the target encoder follow the encoder."""
        follow = getattr(engine.model, "update_world_target", None)
        if follow is not None:
            keep, refused = self.decay(engine), step.refused
            follow(keep if refused is None else keep + (1 - keep) * refused)

    def decay(self, engine: Engine) -> float:
        """The part of the target encoder that this step keeps."""
        keep = self.config.decay
        if self.config.decay_schedule == "constant" or engine.horizon is None:
            return keep
        progress = engine.horizon.progress(engine.state)
        return 1 - (1 - keep) * (1 + math.cos(math.pi * progress)) / 2

    def _foretelling(self, batch: Batch) -> Tensor:
        """(B, T) whether a token and the next one are real and of one document."""
        ids = batch["input_ids"]
        real = real_positions(batch, self.config.ignore_index)
        documents = batch.get("segment_ids", torch.zeros_like(ids))
        pairs = real[:, :-1] & real[:, 1:] & (documents[:, :-1] == documents[:, 1:])
        return F.pad(pairs, (0, 1))
