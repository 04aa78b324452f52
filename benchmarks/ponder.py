"""Published ways to halt a loop: Adaptive Computation Time and PonderNet.

Both refine codes with the layer of the energy module, from the same window of tokens, so that they
differ from it only in when a token stops and in the loss that teaches it. As in universal
transformers (Dehghani et al. 2019), a token that has stopped keeps its code, which others read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus_core import Loss, LossConfig
from nexus_core.batches import Batch
from nexus_plugins.model_nexus.energy import EnergyModule, _windows
from nexus_plugins.model_nexus.residual import Final

__all__ = ["ACT", "PonderCost", "PonderNet", "PonderNetConfig", "PonderNetLoss"]

Reports = dict[str, dict[str, Tensor]]
ENOUGH = 0.99
"""ACT: a token stops when its chances of stopping add up to this, 1 - epsilon."""
FIRST_CHANCE = -1.0
"""The logit of the chance of stopping that an untrained layer gives."""


class Halting(EnergyModule):
    """The shared layer, whose last output is the logit of the chance of stopping."""

    def __init__(
        self, d_model: int, d_code: int, n_memories: int, max_iterations: int, window: int
    ) -> None:
        super().__init__(d_model, d_code, n_memories, max_iterations, window=window)
        nn.init.constant_(self.values.bias[-1:], FIRST_CHANCE)

    def observe(self, final: Final) -> Reports:
        """No further reports."""
        return {}

    def _start(self, h: Tensor, document: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Codes `(N, C)`, contexts `(N, M)`, and which earlier tokens can be read."""
        code, context = self._read(h)
        reach = [self._same(h, document, back).flatten() for back in range(1, self.window)]
        return code.flatten(0, 1), context.flatten(0, 1), reach

    def _next(
        self, code: Tensor, context: Tensor, reach: list[Tensor], moving: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The codes after a refinement, and the chance of stopping there, `(N,)`."""
        if self.training:
            change, logit = self._refine(_windows(code, reach), context)
            return code + change * moving[:, None], logit.sigmoid()
        places = moving.nonzero()[:, 0]
        change, logit = self._refine(_windows(code, reach, places), context[places])
        chance = torch.zeros_like(code[:, 0]).index_copy(0, places, logit.sigmoid())
        return code.index_add(0, places, change), chance


class ACT(Halting):
    """Stop when the chances of stopping add up to 1, and write the mean code, by chances.

    The last chance is what remains to 1. A token's `ponder` is this remainder plus the number of
    its refinements.

    Source: Graves 2016, eq. 5 to 12.
    """

    def forward(self, h: Tensor, document: Tensor | None = None) -> tuple[Tensor, Reports]:
        """The update `(B, T, D)`; under `energy`, `ponder` and `refinements` `(B, T)`."""
        code, context, reach = self._start(h, document)
        mean, total = torch.zeros_like(code), torch.zeros_like(code[:, 0])
        ponder, made, moving = total, total, torch.ones_like(total, dtype=torch.bool)
        for number in range(1, self.max_iterations + 1):
            code, chance = self._next(code, context, reach, moving)
            stops = moving & ((total + chance >= ENOUGH) | (number == self.max_iterations))
            share = torch.where(stops, 1 - total, chance * moving)
            mean = mean + share[:, None] * code
            made = made + moving
            ponder = ponder + moving + share * stops
            total, moving = total + share, moving & ~stops
            if not moving.any():
                break
        reports = {"ponder": ponder.view(h.shape[:2]), "refinements": made.view(h.shape[:2])}
        return self.write(mean).view_as(h), {"energy": reports}


class PonderNet(Halting):
    """Stop after each refinement with a probability; in evaluation this is sampled.

    In training all refinements are made, and `PonderNetLoss` is the expectation over where to stop.

    Source: Banino et al. 2021, eq. 1 to 4.
    """

    def forward(self, h: Tensor, document: Tensor | None = None) -> tuple[Tensor, Reports]:
        """The update `(B, T, D)`: after all refinements in training, else after those made.

        Reports `refinements` `(B, T)` under `energy`; in training also `updates` `(K, B, T, D)` and
        `stops` `(K, B, T)`, the update after each refinement and the probability to stop there.
        """
        code, context, reach = self._start(h, document)
        left, made = torch.ones_like(code[:, 0]), torch.zeros_like(code[:, 0])
        moving, updates, stops = torch.ones_like(left, dtype=torch.bool), [], []
        for number in range(1, self.max_iterations + 1):
            code, chance = self._next(code, context, reach, moving)
            made = made + moving
            if self.training:
                chance = chance if number < self.max_iterations else torch.ones_like(chance)
                updates.append(self.write(code).view_as(h))
                stops.append((left * chance).view(h.shape[:2]))
                left = left * (1 - chance)
            else:
                moving = moving & (torch.rand_like(chance) >= chance)
        reports = {"refinements": made.view(h.shape[:2])}
        if self.training:
            reports |= {"updates": torch.stack(updates), "stops": torch.stack(stops)}
        return self.write(code).view_as(h), {"energy": reports}

    def observe(self, final: Final) -> Reports:
        """In training also `hidden` `(K, B, T, D)`, the final states after each refinement."""
        reports = final.reports["energy"]
        if "updates" not in reports:
            return {}
        after = final.stream - reports["updates"][-1] + reports["updates"]
        hidden = final.norm(after.flatten(0, 1)).view_as(after)
        return {"energy": {**reports, "hidden": hidden}}


class PonderCost(Loss[LossConfig]):
    """ACT's ponder cost; its weight is the time penalty tau (Graves 2016, eq. 13)."""

    config_class = LossConfig

    def units(self, batch: Batch) -> float:
        """The number of tokens."""
        return float(batch["input_ids"].numel())

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over tokens."""
        total: Tensor = output.module_outputs["energy"]["ponder"].sum()
        return total


class PonderNetConfig(LossConfig):
    """Settings of PonderNet's loss."""

    beta: float = Field(default=0.01, description="weight of the divergence from the prior")
    prior: float = Field(default=0.2, description="probability of stopping, in the prior")


class PonderNetLoss(Loss[PonderNetConfig]):
    """The expected cross-entropy, plus the divergence of the stops from a geometric prior.

    It takes the place of the cross-entropy (Banino et al. 2021, eq. 4).
    """

    config_class = PonderNetConfig

    def units(self, batch: Batch) -> float:
        """The number of tokens."""
        return float(batch["input_ids"].numel())

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over tokens."""
        energy = output.module_outputs["energy"]
        stops: Tensor = energy["stops"]
        logits = F.linear(energy["hidden"], output.head_weight).flatten(0, -2)
        labels = batch["labels"].expand(stops.shape).flatten()
        nats = F.cross_entropy(logits, labels, reduction="none").view_as(stops)
        prior = (1 - self.config.prior) ** torch.arange(len(stops))[:, None, None]
        divergence = (stops.clamp_min(1e-9) / (prior / prior.sum())).log()
        return (stops * (nats + self.config.beta * divergence)).sum()
