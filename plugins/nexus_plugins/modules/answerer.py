"""A model that reads a question, thinks about it, and answers."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.reasoning import Reasoner

__all__ = ["Answerer"]

HIDDEN = 260  # of the MLP, which then has as many parameters as the reasoner
STEPS = 3


class Answerer(nn.Module):
    """The reasoner by itself, or an MLP in its place, between a linear map and another.

    Args:
        thinker: reason or mlp.
        told: numbers of a question.
        answers: that there are to choose from.
        width: of the state in between; at 64 both thinkers have as many parameters.
    """

    def __init__(
        self, thinker: Literal["reason", "mlp"], told: int, answers: int, width: int = 64
    ) -> None:
        super().__init__()
        self.read = nn.Linear(told, width)
        layers = (nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, width))
        self.thinker = (
            Reasoner(width, steps=STEPS) if thinker == "reason" else nn.Sequential(*layers)
        )
        self.head = nn.Linear(width, answers)

    def forward(self, told: Tensor) -> Tensor:
        """Questions `(..., told)` to the logits of their answers `(..., answers)`."""
        h = F.rms_norm(self.read(told), self.read.weight.shape[:1])
        thought = self.thinker(h)
        update = thought[0] if isinstance(thought, tuple) else thought
        answer: Tensor = self.head(F.rms_norm(h + update, h.shape[-1:]))
        return answer
