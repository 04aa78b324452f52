"""Denoising: what a token was before noise of a known kind and an unknown level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.tasks.task import Batch, Task, Variant, generator

__all__ = ["TASK", "Denoising"]


@dataclass(frozen=True)
class Denoising(Task):
    """A walk through a graph, of which some tokens are replaced at random; say what they were.

    Each token has a few successors (the graph belongs to the seed). A part of each row's tokens,
    another part for every row, is replaced by any token. The label of a position is the token
    that stood there, or before it was replaced.
    """

    name: ClassVar[str] = "denoising"
    module: ClassVar[str] = "energy"

    symbols: int = 32
    successors: int = 2
    most_noise: float = 0.6
    """The level of noise is uniform from 0 to this."""

    @property
    def vocab_size(self) -> int:
        """The tokens of the walk."""
        return self.symbols

    def batch(self, seed: int, step: int) -> Batch:
        """Noisy walks, with the clean walk as labels and the `level` of each row."""
        world, draw = generator(seed), generator(seed, step)
        graph = torch.stack(
            [torch.randperm(self.symbols, generator=world) for _ in range(self.successors)], 1
        )
        choices = torch.randint(self.successors, (self.length, self.rows), generator=draw)
        clean = [torch.randint(self.symbols, (self.rows,), generator=draw)]
        for choice in choices[1:]:
            clean.append(graph[clean[-1], choice])
        labels = torch.stack(clean, 1)
        level = self.most_noise * torch.rand((self.rows, 1), generator=draw)
        is_noise = torch.rand(labels.shape, generator=draw) < level
        noise = torch.randint(self.symbols, labels.shape, generator=draw)
        return {"input_ids": torch.where(is_noise, noise, labels), "labels": labels, "level": level}

    def variants(self) -> list[Variant]:
        """The energy module, the backbone, an MLP."""
        return self.standard({}, {"loss_energy": {}})


TASK = Denoising
