"""Deep Thinking networks, which are published to think further than they were trained to.

Source: Schwarzschild et al. 2021, "Can You Learn an Algorithm?"; recall and the progressive loss:
    Bansal et al. 2022, "End-to-end Algorithm Synthesis with Recurrent Networks". Their layers are
    convolutions over grids; these are linear, as the questions are vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DeepThinking"]


class DeepThinking(nn.Module):
    """A residual block in a loop that reads the question again at each iteration.

    Args:
        question_size: numbers in a question.
        answers: number of possible answers.
        parameters: minimum number of parameters.
        iterations: M, iterations in training.
        progressive: alpha, the share of the progressive loss.
    """

    def __init__(
        self, question_size: int, answers: int, parameters: int, iterations: int, progressive: float
    ) -> None:
        super().__init__()
        self.iterations, self._trained_for = iterations, iterations
        self.progressive = progressive
        width = 1
        while _size(question_size, answers, width) < parameters:
            width += 1
        self.read = nn.Linear(question_size, width)
        self.recall = nn.Linear(width + question_size, width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.head = nn.Linear(width, answers)

    def forward(self, question: Tensor) -> Tensor:
        """Questions `(..., question_size)` to the logits of their answers `(..., answers)`."""
        answer: Tensor = self.head(self._thought(self._start(question), question, self.iterations))
        return answer

    def loss(self, question: Tensor, answer: Tensor) -> Tensor:
        """Cross-entropy after all iterations, mixed with the progressive loss (Bansal, alg. 1).

        The latter makes n iterations without a gradient, then k with one, and 0 <= n < n + k <= M.
        """
        loss = F.cross_entropy(self(question), answer)
        if self.progressive == 0:
            return loss
        without = int(torch.randint(self._trained_for, ()))
        count = int(torch.randint(1, self._trained_for - without + 1, ()))
        state = self._start(question)
        if without:
            state = self._thought(state, question, without).detach()
        answered = self.head(self._thought(state, question, count))
        progressive = F.cross_entropy(answered, answer)
        return (1 - self.progressive) * loss + self.progressive * progressive

    def think_longer(self) -> None:
        """Make one more iteration from now on."""
        self.iterations += 1

    def _start(self, question: Tensor) -> Tensor:
        return F.relu(self.read(question))

    def _thought(self, state: Tensor, question: Tensor, iterations: int) -> Tensor:
        for _ in range(iterations):
            state = F.relu(self.recall(torch.cat([state, question], -1)))
            state = F.relu(state + self.outer(F.relu(self.inner(state))))
        return state


def _size(question_size: int, answers: int, width: int) -> int:
    """The number of parameters at this width."""
    return width * (2 * question_size + 3 * width + 4 + answers) + answers
