"""Hidden dynamics: a world with a law of its own, seen through noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.tasks.task import Batch, Task, Variant, generator

__all__ = ["TASK", "Dynamics"]


@dataclass(frozen=True)
class Dynamics(Task):
    """Each row moves along a hidden cycle of its own, and shows a symbol at every place of it.

    Length and symbols of the cycle are drawn for each row; some tokens are replaced by any symbol.
    Two places may look alike, so what comes next depends on the place, not on the symbol. Who has
    found the cycle knows all that follows but the noise.
    """

    name: ClassVar[str] = "dynamics"
    module: ClassVar[str] = "world"

    symbols: int = 12
    shortest: int = 6
    longest: int = 12
    noise: float = 0.0
    """Part of the tokens that are replaced."""
    d_latent: int = 64
    levels: int = 4
    """Moves that the world model rolls out."""
    heads: int = 0
    latent_weight: float = 0.3

    @property
    def vocab_size(self) -> int:
        """One token a symbol."""
        return self.symbols

    def batch(self, seed: int, step: int) -> Batch:
        """What is seen, with what is seen next as label."""
        draw = generator(seed, step)
        lengths = torch.randint(self.shortest, self.longest + 1, (self.rows, 1), generator=draw)
        cycles = torch.randint(self.symbols, (self.rows, self.longest), generator=draw)
        places = torch.arange(self.length + 1).expand(self.rows, -1) % lengths
        seen = cycles.gather(1, places)
        is_noise = torch.rand(seen.shape, generator=draw) < self.noise
        seen = seen.where(~is_noise, torch.randint(self.symbols, seen.shape, generator=draw))
        return {"input_ids": seen[:, :-1], "labels": seen[:, 1:]}

    def variants(self) -> list[Variant]:
        """The world model, the backbone, an MLP; multi-token prediction, the classical world."""
        sizes = {"d_latent": self.d_latent, "world_levels": self.levels, "world_heads": self.heads}
        heads_alone = {"latent_weight": 0.0, "token_weight": 0.0}
        return [
            *self.standard(sizes, {"loss_world": {"latent_weight": self.latent_weight}}),
            Variant(
                "multi-token",
                {"world": True, "d_latent": self.d_latent, "world_levels": 1, "world_heads": 2},
                {"loss_world": heads_alone},
            ),
            Variant("classic", {"world": True, "classic": True}, {"loss_world": {"classic": True}}),
        ]


TASK = Dynamics
