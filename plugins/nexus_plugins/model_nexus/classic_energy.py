"""The classic energy module: each token's code settles in a minimum of a learned energy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import GatedWrite, Part, widened

__all__ = ["ClassicEnergyModule"]

SHARPNESS = 8.0
STEP_START = 0.7
STOP_SHARPNESS = 4.0  # exponent of change / threshold in the odds of continuing
NORM_EPS = 1e-12


class ClassicEnergyModule(Part):
    """Refine a code z of each token by the gradient of an energy, until it hardly changes.

    `E(h, z) = |z - c(h)|^2 / 2 - log(mean_m exp(s * m . z)) / s` over M learned memories m of
    norm 1, where c(h), of norm 1, is computed from the token's state and s is a sharpness: codes
    near c(h) and near a memory have low energy. The energy is at least -1.5 and falls with every
    refinement. Familiar tokens settle in a few refinements; those between memories take more. A
    settled token is frozen, so tokens do not depend on one another.

    The refined code is differentiable throughout. The energy that is reported for a loss trains
    only the memories (at a minimum the code's own share of the gradient is zero):
    they become a mixture density of the codes (von Mises-Fisher, of fixed concentration). Were
    c(h) to follow it too, every token would end up on one memory.

    Shapes: D model, M memories.

    Args:
        d_model: width D of the backbone states.
        d_code: width of the codes.
        n_memories: memories M.
        max_iterations: maximum refinements; all are computed, to avoid a device sync.
        threshold: a token has settled when a refinement moves its code by less (Euclidean).

    Source: the energy and its descent are those of modern Hopfield networks (Ramsauer et al.
        2021) with the pull towards the origin replaced by one towards c(h); with a concave second
        part and steps of at most 1, descent is guaranteed (Yuille & Rangarajan 2003).
    """

    def __init__(
        self,
        d_model: int,
        d_code: int = 32,
        n_memories: int = 32,
        max_iterations: int = 8,
        threshold: float = 0.01,
    ) -> None:
        super().__init__()
        self.max_iterations = max_iterations
        self.threshold = threshold
        self.read = nn.Linear(d_model, d_code)
        self.memories = nn.Parameter(torch.randn(n_memories, d_code))
        self.step_logit = nn.Parameter(torch.tensor(math.log(STEP_START / (1 - STEP_START))))
        self.write = GatedWrite(d_code, d_model)

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Update states of any leading shape, each independently.

        Args:
            h: `(..., D)` normalized backbone states.
            document: unused: tokens do not interact.

        Returns:
            The update `(..., D)`, and `{"energy": reports}` with tensors `(...)` in float32 or
            wider: `final_energy`; `iterations`, the expected number of refinements if the odds of
            continuing are `(change / threshold) ** 4` each time, with gradient; `refinements`, the
            number that actually moved the code, without gradient.
        """
        context = widened(self.read(h))
        with torch.autocast(h.device.type, enabled=False):
            code, reports = self._settle(F.normalize(context, dim=-1))
        return self.write(code.to(h.dtype)), {"energy": reports}

    def energy(self, context: Tensor, code: Tensor) -> Tensor:
        """E for contexts of length 1 and codes, both `(..., d_code)`; returns `(...)`."""
        scores = code @ self._unit_memories().T * SHARPNESS
        soft_best = (scores.logsumexp(-1) - math.log(len(self.memories))) / SHARPNESS
        return (code - context).square().sum(-1) / 2 - soft_best

    def _settle(self, context: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        memories, rate = self._unit_memories(), widened(self.step_logit).sigmoid()
        code = context
        moving = torch.ones_like(context[..., :1], dtype=torch.bool)
        going_on = torch.ones_like(context[..., :1])
        expected = torch.zeros_like(going_on)
        refinements = torch.zeros_like(going_on)
        for _ in range(self.max_iterations):
            recalled = (code @ memories.T * SHARPNESS).softmax(-1) @ memories
            change = rate * (context + recalled - code)
            size = (change.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()
            code = torch.where(moving, code + change, code)
            refinements = refinements + moving
            expected = expected + going_on
            going_on = going_on * (STOP_SHARPNESS * (size / self.threshold).log()).sigmoid()
            moving = moving & (size >= self.threshold)
        return code, {
            "iterations": expected.squeeze(-1),
            "final_energy": self.energy(context.detach(), code.detach()),
            "refinements": refinements.detach().squeeze(-1),
        }

    def _unit_memories(self) -> Tensor:
        return F.normalize(widened(self.memories), dim=-1)
