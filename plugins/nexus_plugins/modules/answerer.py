"""A model that reads a question, runs a reasoner, and answers."""

from __future__ import annotations

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
        told: size of a question.
        answers: number of possible answers.
        width: width of the hidden state; at 64 both have the same number of parameters.
    """

    def __init__(
        self, thinker: Literal["reason", "mlp"], told: int, answers: int, width: int = 64
    ) -> None:
        super().__init__()
        self.read = nn.Linear(told, width)
        self.thinker = Reasoner(width, steps=STEPS) if thinker == "reason" else _mlp(width)
        self.head = nn.Linear(width, answers)

    def forward(self, told: Tensor) -> Tensor:
        """Questions `(..., told)` to the logits of their answers `(..., answers)`."""
        h = F.rms_norm(self.read(told), self.read.weight.shape[:1])
        thought = self.thinker(h)
        update = thought[0] if isinstance(thought, tuple) else thought
        answer: Tensor = self.head(F.rms_norm(h + update, h.shape[-1:]))
        return answer


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, width))
