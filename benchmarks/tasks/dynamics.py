"""Hidden dynamics: a world with its own law, observed through noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.tasks.task import Batch, Task, Variant, generator
from nexus_plugins.modules.puzzles import dynamics

__all__ = ["TASK", "Dynamics"]


@dataclass(frozen=True)
class Dynamics(Task):
    """Each row follows its own hidden cycle; see `puzzles.dynamics`."""

    name: ClassVar[str] = "dynamics"
    module: ClassVar[str] = "world"

    symbols: int = 12
    shortest: int = 6
    longest: int = 12
    noise: float = 0.0
    """Share of the tokens that are replaced."""
    d_latent: int = 64
    levels: int = 8
    """Moves that the world model rolls out."""
    stride: int = 4
    """Positions per start of a roll-out."""
    heads: int = 0
    latent_weight: float = 0.05

    @property
    def vocab_size(self) -> int:
        """One token per symbol."""
        return self.symbols

    def batch(self, seed: int, step: int) -> Batch:
        """The observations, with the next observation as label."""
        sizes = (self.symbols, self.shortest, self.longest, self.noise)
        return dynamics(generator(seed, step), self.rows, self.length, *sizes)

    def variants(self) -> list[Variant]:
        """World model, backbone, MLP, multi-token prediction, and the classic world model."""
        sizes = {
            "d_latent": self.d_latent,
            "world_levels": self.levels,
            "world_heads": self.heads,
            "world_stride": self.stride,
        }
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
