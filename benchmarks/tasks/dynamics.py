"""Hidden dynamics: what a token shows of a world that moves on by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.tasks.task import IGNORED, Batch, Task, Variant, generator

__all__ = ["TASK", "Dynamics"]


@dataclass(frozen=True)
class Dynamics(Task):
    """Hidden oscillators, each with a speed of its own; a token is a rough reading of their sum.

    Every row has new phases and speeds (of a set that belongs to the seed). One reading says
    little; phases and speeds must be inferred from many, and then all that follows is known but
    for the noise.
    """

    name: ClassVar[str] = "dynamics"
    module: ClassVar[str] = "world"

    oscillators: int = 2
    speeds: int = 8
    """How many speeds there are to choose from."""
    levels: int = 32
    """Readings that a token can show."""
    noise: float = 0.0
    """Standard deviation, in levels."""

    @property
    def vocab_size(self) -> int:
        """One token a reading."""
        return self.levels

    def batch(self, seed: int, step: int) -> Batch:
        """Readings, with the next one as label."""
        world, draw = generator(seed), generator(seed, step)
        speeds = 0.1 + 0.9 * torch.rand(self.speeds, generator=world)
        shape = (self.rows, self.oscillators, 1)
        speed = speeds[torch.randint(self.speeds, shape, generator=draw)]
        phase = 2 * torch.pi * torch.rand(shape, generator=draw)
        time = torch.arange(self.length + 1)
        sums = torch.sin(phase + speed * time).sum(1) / self.oscillators
        readings = self._read(sums, draw)
        labels = readings[:, 1:].clone()
        labels[:, : self.length // 8] = IGNORED
        return {"input_ids": readings[:, :-1], "labels": labels}

    def _read(self, sums: Tensor, draw: torch.Generator) -> Tensor:
        exact = (sums + 1) / 2 * (self.levels - 1)
        rough = exact + self.noise * torch.randn(sums.shape, generator=draw)
        return rough.round().long().clamp(0, self.levels - 1)

    def variants(self) -> list[Variant]:
        """The world model, the backbone, an MLP."""
        return self.standard({}, {"loss_world": {}})


TASK = Dynamics
