"""The world-model loss: predict the model's own next states, and the tokens after next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from nexus_core.plugin import hookimpl
from nexus_plugins._shared.linear_cross_entropy import linear_cross_entropy
from nexus_plugins._shared.module_loss import (
    ModuleLoss,
    PositionLossConfig,
    real_positions,
    refuse_idle,
)

if TYPE_CHECKING:
    from nexus_core import Engine, Step
    from nexus_core.batches import Batch

__all__ = ["LossWorldConfig", "LossWorldPlugin"]

MODERN = ("latent_weight", "token_weight", "head_weight")
CLASSIC = ("variance_weight", "variance_floor", "decay", "decay_schedule")
"""Settings that only apply to one of the two formulas."""


class LossWorldConfig(PositionLossConfig):
    """Settings of the world-model loss and of its target encoder."""

    weight: float = Field(
        default=1.0, description="weight of this term in the total loss; classic: default 0.1"
    )
    latent_weight: float = Field(
        default=0.3, ge=0, description="weight of the distance between predicted and later states"
    )
    token_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of the cross-entropy of the token after a predicted state",
    )
    head_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of the cross-entropy of the heads for tokens further ahead",
    )
    classic: bool = Field(default=False, description="the loss of the classic world model")
    variance_weight: float = Field(
        default=0.1, ge=0, description="weight of the variance hinge; classic"
    )
    variance_floor: float = Field(
        default=0.1,
        ge=0,
        description="variance over dimensions below which the hinge is active; classic",
    )
    decay: float = Field(
        default=0.996,
        ge=0,
        le=1,
        description="decay of the target encoder per optimizer step; classic",
    )
    decay_schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description="cosine: the decay rises to 1 by the end of the run; classic",
    )

    @model_validator(mode="before")
    @classmethod
    def _classical_weight(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"weight": 0.1, **given} if given.get("classic") else given

    @model_validator(mode="after")
    def _acts(self) -> LossWorldConfig:
        refuse_idle(self, self.classic, MODERN if self.classic else CLASSIC)
        return self


class LossWorldPlugin(ModuleLoss[LossWorldConfig]):
    """Trains the model to predict its own next states and the tokens after the next one.

    The model reports `world` and `world_targets` `(B, S, K, D)` and `world_mask` `(B, S, K)`, true
    if a target exists, for the positions `world_starts` `(B, S)`, each of which stands for
    `world_stride` positions; without these two, for all positions. A position counts if the next
    token exists and is in the same document; its loss is the mean over K, with missing targets
    counting 0, of `latent_weight * smooth_l1(world, world_targets)`, a mean over D. If it also
    reports `world_heads` `(B, S, M, D)`, `world` are states that `head_weight` turns into logits,
    and the loss has two more parts: `token_weight` times the cross-entropy of the token after each
    state of `world`, with the head detached, mean over K; and `head_weight` times that of the
    tokens 2, 3, ... ahead, mean over M. Tokens whose `labels` are -100 are ignored.

    States equal for all tokens would have zero loss here, but a high cross-entropy: they cannot
    collapse while the language model is trained.

    With `classic`, the mean is over the targets that exist of
    `mean((world - world_targets)^2) + variance_weight * relu(variance_floor - variance)`, the
    variance (population) being that of the prediction over D; without `world_targets` there is
    only the second part. The model may have `update_world_target(decay)`.

    The hinge keeps one prediction from being the same number in every dimension. It does not
    prevent collapse: latents equal for all tokens have zero loss. That is prevented by the targets,
    which have no gradient, lag behind, and are normalized to mean 0 and variance 1.

    Source: Teoh et al. 2025, "Next-Latent Prediction Transformers Learn Compact World Models", the
        smooth L1 distance and the divergence; Gloeckle et al. 2024 for the heads. Classic: VICReg
        (Bardes et al. 2022) has a hinge on the standard deviation over the batch, for each
        dimension. That is not a sum over positions, so the gradient of a step would depend on its
        split into micro-batches; here it is on the variance over the latent dimension. The cosine
        decay is that of BYOL (Grill et al. 2020).
    """

    config_class = LossWorldConfig
    api_version: ClassVar[str] = "1.2"

    def units(self, batch: Batch) -> Tensor:
        """The number of positions with a next token in the same document."""
        return self._foretelling(batch).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions of the mean over their targets."""
        reports = self.reports(output)
        if self.config.classic:
            return self._classic(batch, reports)
        starts = reports.get("world_starts")
        counts = at(self._foretelling(batch), starts).unsqueeze(-1) & reports["world_mask"]
        total = self._of_states(reports, counts)
        if "world_heads" in reports:
            total = total + self._of_tokens(batch, output.head_weight, reports, counts)
        stride: int = reports.get("world_stride", 1)
        return total * stride

    def _of_states(self, reports: Mapping[str, Any], counts: Tensor) -> Tensor:
        """The distances between predicted and actual states."""
        predictions = wide(reports["world"])
        if not self.config.latent_weight:
            return predictions.new_zeros(())
        targets = wide(reports["world_targets"])
        each = F.smooth_l1_loss(predictions, targets, reduction="none").mean(-1)
        total: Tensor = self.config.latent_weight * (each * counts).sum() / predictions.shape[2]
        return total

    def _of_tokens(
        self, batch: Batch, head: Tensor, reports: Mapping[str, Any], counts: Tensor
    ) -> Tensor:
        """The cross-entropies of the token after predicted states, and of the heads' tokens."""
        states, heads = reports["world"], reports["world_heads"]
        starts = reports.get("world_starts")
        reached = [self._reaches(batch, ahead) for ahead in range(1, heads.shape[2] + 1)]
        of_states = self._nats(batch, states, starts, head.detach(), counts)
        total = self.config.token_weight * of_states
        if reached:
            reach = at(torch.stack(reached, 2), starts)
            total = total + self.config.head_weight * self._nats(batch, heads, starts, head, reach)
        return total

    def _nats(
        self, batch: Batch, states: Tensor, starts: Tensor | None, head: Tensor, counts: Tensor
    ) -> Tensor:
        """The cross-entropy of the token after next, and so on, from states `(B, S, K, D)`."""
        skipped, ahead = self.config.ignore_index, states.shape[2]
        after = batch.get("labels", later(batch["input_ids"], 1, skipped))
        wanted = torch.stack([later(after, n, skipped) for n in range(1, ahead + 1)], 2)
        wanted = at(wanted, starts).where(counts, skipped).flatten()
        return linear_cross_entropy(states.flatten(0, 2), head, wanted, 0.0, skipped) / ahead

    def _classic(self, batch: Batch, reports: Mapping[str, Tensor]) -> Tensor:
        predictions = wide(reports["world"])
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
        """Update the target encoder towards the encoder."""
        follow = getattr(engine.model, "update_world_target", None)
        if follow is not None:
            keep, refused = self.decay(engine), step.refused
            follow(keep if refused is None else keep + (1 - keep) * refused)

    def decay(self, engine: Engine) -> float:
        """The decay of the target encoder's average at this step."""
        keep = self.config.decay
        if self.config.decay_schedule == "constant" or engine.horizon is None:
            return keep
        progress = engine.horizon.progress(engine.state)
        return 1 - (1 - keep) * (1 + math.cos(math.pi * progress)) / 2

    def _foretelling(self, batch: Batch) -> Tensor:
        """`(B, T)`: whether a token and the next one are real and in the same document."""
        return self._reaches(batch, 1)

    def _reaches(self, batch: Batch, ahead: int) -> Tensor:
        """`(B, T)`: whether a token and the one `ahead` of it are real and in the same document."""
        real = real_positions(batch, self.config.ignore_index)
        documents = batch.get("segment_ids", torch.zeros_like(batch["input_ids"]))
        same = later(documents, ahead, -1) == documents
        reaches: Tensor = real & later(real, ahead, 0) & same
        return reaches


def later(values: Tensor, ahead: int, missing: int) -> Tensor:
    """Values `ahead` positions later, `missing` past the end; `(B, T)`."""
    ahead = min(ahead, values.shape[1])
    return F.pad(values[:, ahead:], (0, ahead), value=missing)


def at(values: Tensor, places: Tensor | None) -> Tensor:
    """Values `(B, T, ...)` at some positions `(B, S)`; None: at all."""
    if places is None:
        return values
    return values[torch.arange(len(places), device=places.device).unsqueeze(1), places]


def wide(values: Tensor) -> Tensor:
    """The values in float32, or in their own dtype if that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
