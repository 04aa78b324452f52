"""Deep Thinking networks, which are published to think further than they were trained to.

Source: Schwarzschild et al. 2021, "Can You Learn an Algorithm?"; recall and the progressive loss:
    Bansal et al. 2022, "End-to-end Algorithm Synthesis with Recurrent Networks". Their layers are
    convolutions over grids; these are attention to earlier tokens, and linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus_core import Loss, LossConfig
from nexus_core.batches import Batch
from nexus_plugins.model_nexus.residual import Final, Part
from nexus_plugins.model_nexus.window import WindowAttention

__all__ = ["DeepThinking", "ProgressiveLoss", "ProgressiveLossConfig"]


class DeepThinking(Part):
    """A residual block in a loop that reads the backbone's states again at each iteration.

    In training it also makes a random number of iterations without a gradient, then a random number
    with one, at most as many as usual in all (Bansal et al. 2022, alg. 1).

    Args:
        d_model: width D.
        inner: hidden units of the block.
        iterations: M, iterations in training.
        window: tokens that an iteration reads.
    """

    def __init__(self, d_model: int, inner: int, iterations: int, window: int) -> None:
        super().__init__()
        self.steps = iterations
        self.again = nn.Linear(2 * d_model, d_model)
        self.attention = WindowAttention(d_model, 16, window)
        self.inner = nn.Linear(d_model, inner)
        self.outer = nn.Linear(inner, d_model, bias=False)

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """The update `(B, T, D)`; in training, under `deep_thinking`, also that part of the way."""
        update = self._thought(h, h, document, self.steps) - h
        if not self.training:
            return update, {}
        without = int(torch.randint(self.steps, ()))
        count = int(torch.randint(1, self.steps - without + 1, ()))
        with torch.no_grad():
            start = self._thought(h, h, document, without)
        change = self._thought(start, h, document, count) - h - update
        return update, {"deep_thinking": {"change": change}}

    def observe(self, final: Final) -> dict[str, dict[str, Tensor]]:
        """In training, the final states `(B, T, D)` part of the way."""
        if not self.training:
            return {}
        change = final.reports["deep_thinking"]["change"]
        return {"deep_thinking": {"hidden": final.norm(final.stream + change)}}

    def _thought(
        self, state: Tensor, h: Tensor, document: Tensor | None, iterations: int
    ) -> Tensor:
        for _ in range(iterations):
            state = self.again(torch.cat([state, h], -1))
            state = state + self.attention(_normed(state), document)
            state = state + self.outer(F.relu(self.inner(_normed(state))))
        return state


class ProgressiveLossConfig(LossConfig):
    """Settings of the progressive loss."""

    share: float = Field(default=0.5, description="alpha, the share of the progressive loss")


class ProgressiveLoss(Loss[ProgressiveLossConfig]):
    """The cross-entropy after all iterations, mixed with that part of the way."""

    config_class = ProgressiveLossConfig

    def units(self, batch: Batch) -> float:
        """The number of labels that count."""
        return float((batch["labels"] != -100).sum())

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over labels."""
        part_way = output.module_outputs["deep_thinking"]["hidden"]
        whole, part = (
            F.cross_entropy(
                F.linear(hidden, output.head_weight).flatten(0, 1),
                batch["labels"].flatten(),
                reduction="sum",
            )
            for hidden in (output.hidden, part_way)
        )
        return (1 - self.config.share) * whole + self.config.share * part


def _normed(state: Tensor) -> Tensor:
    return F.rms_norm(state, state.shape[-1:])
