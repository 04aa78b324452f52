"""A model that reads a question, applies the reasoner, and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.reasoning import Reasoner

__all__ = ["Answerer"]

HIDDEN = 260  # of the MLP, which then has as many parameters as the reasoner
STEPS = 3


class Answerer(nn.Module):
    """The reasoner, or an MLP in its place, between two linear layers.

    Args:
        thinker: reason or mlp.
        question_size: numbers in a question.
        answers: number of possible answers.
        width: width of the hidden state; at 64 both have the same number of parameters.
    """

    def __init__(
        self, thinker: Literal["reason", "mlp"], question_size: int, answers: int, width: int = 64
    ) -> None:
        super().__init__()
        self.read = nn.Linear(question_size, width)
        self.thinker = Reasoner(width, steps=STEPS) if thinker == "reason" else MLP(width)
        self.head = nn.Linear(width, answers)

    def forward(self, question: Tensor) -> Tensor:
        """Questions `(..., question_size)` to the logits of their answers `(..., answers)`."""
        h = _normalized(self.read(question))
        update, _ = self.thinker(h)
        answer: Tensor = self.head(_normalized(h + update))
        return answer


class MLP(nn.Sequential):
    """Two linear layers; returns its update and an empty report, as a reasoner does."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, width))

    def forward(self, h: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The update `(..., width)` of states of the same shape."""
        for layer in self:
            h = layer(h)
        return h, {}


def _normalized(h: Tensor) -> Tensor:
    return F.rms_norm(h, h.shape[-1:])
