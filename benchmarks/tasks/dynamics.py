"""Hidden dynamics: a world with its own law, observed through noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.tasks.task import Batch, Task, Variant, generator
from nexus_plugins.model_nexus.delta import GatedDelta
from nexus_plugins.model_nexus.residual import Part
from nexus_plugins.modules.puzzles import dynamics

__all__ = ["TASK", "DeltaLayer", "Dynamics"]


class DeltaLayer(Part):
    """A gated delta-rule layer in a module's place: a memory without a world model.

    Args:
        d_model: width D.
        parameters: minimum number of parameters.
    """

    def __init__(self, d_model: int, parameters: int) -> None:
        super().__init__()
        fixed, of_key = 3 * d_model**2 + 9 * d_model + 4, 4 * d_model + 20
        d_key = max(1, -(-(parameters - fixed) // of_key))
        self.layer = GatedDelta(d_model, d_key, head_dim=d_model // 2, expand=1)

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The update of the stream `(B, T, D)`, without reports."""
        return self.layer(h, document), {}


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
    stride: int = 8
    """Positions per start of a roll-out."""
    memory: int = 32
    """Width of the memory of the row's own moves."""
    heads: int = 0
    weight: float = 0.3
    """Weight of the world model's loss."""
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
        """World model, backbone, MLP; halves of the world model; published designs."""
        sizes = {
            "d_latent": self.d_latent,
            "world_levels": self.levels,
            "world_heads": self.heads,
            "world_stride": self.stride,
            "world_memory": self.memory,
        }
        latents = {"latent_weight": self.latent_weight}
        heads_alone = {"latent_weight": 0.0, "token_weight": 0.0}
        multi_token = {"d_latent": self.d_latent, "world_levels": 1, "world_heads": 2}
        # Its roll-outs are not trained: one move from one position, since none costs nothing.
        memory_alone = {**sizes, "world_levels": 1, "world_stride": self.length}
        return [
            *self.standard(sizes, {"loss_world": {"weight": self.weight, **latents}}),
            Variant("memory alone", {"world": True, **memory_alone}),
            Variant(
                "roll-outs alone",
                {"world": True, **sizes, "world_stride": 4, "world_memory": 0},
                {"loss_world": latents},
            ),
            Variant("delta layer", in_place=DeltaLayer),
            Variant("multi-token", {"world": True, **multi_token}, {"loss_world": heads_alone}),
            Variant("classic", {"world": True, "classic": True}, {"loss_world": {"classic": True}}),
        ]


TASK = Dynamics
