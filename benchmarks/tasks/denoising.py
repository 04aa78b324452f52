"""Denoising: restore tokens after noise of a known kind and unknown level."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.ponder import ACT, PonderCost, PonderNet, PonderNetLoss
from benchmarks.tasks.task import Batch, Seen, Task, Variant, generator
from nexus_plugins.model_nexus import NEXUSCore
from nexus_plugins.modules.looks import spearman
from nexus_plugins.modules.puzzles import Rule, noisy

__all__ = ["TASK", "Denoising"]


@dataclass(frozen=True)
class Denoising(Task):
    """A sequence that follows a rule, with some tokens replaced; predict the original ones.

    Every token is a function of the two before it; the rule depends on the seed. The share of
    replaced tokens varies by row; see `puzzles.noisy`.
    """

    name: ClassVar[str] = "denoising"
    module: ClassVar[str] = "energy"

    symbols: int = 8
    order: int = 2
    """Number of previous tokens that determine a token: 1 or 2."""
    most_noise: float = 0.7
    """The level of noise is uniform from 0 to this."""
    blanks: float = 0.5
    """Share of the replaced tokens that are blank."""
    d_code: int = 32
    window: int = 8
    n_memories: int = 128
    iterations: int = 6
    threshold: float = 0.01
    weight: float = 0.2
    ponder_cost: float = 0.01
    """ACT's time penalty."""
    ponder_beta: float = 0.03
    """PonderNet's weight of the divergence from its prior."""
    ponder_prior: float = 0.2
    """Its prior's probability of stopping."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens of the rule, plus the blank."""
        return self.symbols + 1

    def batch(self, seed: int, step: int) -> Batch:
        """Noisy sequences, with the clean ones as labels and the `level` of each row."""
        draw = generator(seed, step)
        return self._noisy(seed, self.most_noise * torch.rand((self.rows, 1), generator=draw), draw)

    def _noisy(self, seed: int, level: Tensor, draw: torch.Generator) -> Batch:
        rule = Rule.drawn(generator(seed), self.symbols, self.order)
        return noisy(draw, rule, level, self.length, self.blanks)

    def variants(self) -> list[Variant]:
        """The energy module, the backbone, an MLP, and two published ways to halt."""
        sizes = {
            "d_code": self.d_code,
            "n_memories": self.n_memories,
            "energy_window": self.window,
            "max_energy_iters": self.iterations,
            "energy_threshold": self.threshold,
        }
        own = (self.d_code, self.n_memories, self.iterations, self.window)
        beta, prior = self.ponder_beta, self.ponder_prior
        return [
            *self.standard(sizes, {"loss_energy": {"weight": self.weight}}),
            Variant(
                "ponder_net",
                in_place=lambda width, _: PonderNet(width, *own),
                own_loss=lambda: PonderNetLoss(beta=beta, prior=prior),
                cross_entropy=False,
            ),
            Variant(
                "act",
                in_place=lambda width, _: ACT(width, *own),
                own_loss=lambda: PonderCost(weight=self.ponder_cost),
            ),
        ]

    def measure(self, seen: Seen) -> dict[str, float]:
        """Also the refinements made, and their rank correlation with the noise level."""
        found = super().measure(seen)
        if "energy" not in seen[0][1].module_outputs:
            return found
        made = torch.cat([out.module_outputs["energy"]["refinements"] for _, out in seen])
        level = torch.cat([batch["level"] for batch, _ in seen])
        return found | {
            "refinements": made.mean().item(),
            "of the easiest third": made[level[:, 0] < self.most_noise / 3].mean().item(),
            "of the hardest third": made[level[:, 0] > self.most_noise / 1.5].mean().item(),
            "rank correlation, rows": spearman(made.mean(1), level[:, 0]),
            "rank correlation, tokens": spearman(made.flatten(), level.expand_as(made).flatten()),
        }

    def oracle(self, seed: int) -> float:
        """The held-out nats of Bayes' rule, for a model that knows the rule and the noise.

        A rule and two tokens make a sequence, so it weighs all pairs of tokens, and 64 levels of
        noise, by the tokens read so far.
        """
        rule = Rule.drawn(generator(seed), self.symbols, self.order)
        pairs = torch.cartesian_prod(*2 * [torch.arange(self.symbols)])
        clean = rule.continued(pairs, self.length)  # (pairs, T)
        level = self.most_noise * (torch.arange(64) + 0.5)[:, None] / 64  # (levels, 1)
        nats = []
        for batch in self.held_out(seed):
            ids, labels = batch["input_ids"][:, None], batch["labels"][:, None]  # (B, 1, T)
            noise = torch.where(ids == self.symbols, self.blanks, (1 - self.blanks) / self.symbols)
            likely = (1 - level) * (ids == clean)[:, :, None] + level * noise[:, :, None]
            weight = likely.double().log().cumsum(-1).flatten(1, 2).softmax(1)
            weight = weight.unflatten(1, (len(clean), len(level))).sum(2)  # (B, pairs, T)
            nats.append(-(weight * (clean == labels)).sum(1).log().mean().item())
        return statistics.mean(nats)

    def timed(self, model: NEXUSCore, seed: int) -> dict[str, float]:
        """The module's CPU time for rows without noise and with the most noise, and the oracle."""
        if not model.parts:
            return {}
        read: list[Tensor] = []
        (part,) = model.parts.values()
        hook = part.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        seconds: dict[float, list[float]] = {0.0: [], self.most_noise: []}
        for number in range(9):
            for level, taken in seconds.items():
                draw = generator(seed, number)
                ids = self._noisy(seed, torch.full((self.rows, 1), level), draw)["input_ids"]
                model.hidden(ids, observed=False)
                begin = time.process_time()
                part(read[-1])
                taken.append(time.process_time() - begin)
        hook.remove()
        easy, hard = (1000 * statistics.median(taken) for taken in seconds.values())
        times = {"ms without noise": easy, "ms with most noise": hard}
        return {**times, "nats of an oracle": self.oracle(seed)}


TASK = Denoising
