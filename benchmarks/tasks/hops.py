"""Hops: follow a few steps through the row's own table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.tasks.task import IGNORED, Batch, Seen, Task, Variant, generator
from nexus_plugins.modules.looks import right_by_hops

__all__ = ["TASK", "Hops"]


@dataclass(frozen=True)
class Hops(Task):
    """Each row has a table of which place leads to which, and asks where 1 to `most` hops end.

    The first tokens are the lines of the table, in random order; each token after them is a
    question (a place and a number of hops), whose label is the place where they end.
    """

    name: ClassVar[str] = "hops"
    module: ClassVar[str] = "reason"

    places: int = 6
    most: int = 3
    n_predicates: int = 64
    n_rules: int = 128

    @property
    def vocab_size(self) -> int:
        """One token for each possible table line and each question."""
        return self.places * (self.places + self.most)

    def batch(self, seed: int, step: int) -> Batch:
        """Tables and questions, with the answers as labels."""
        draw = generator(seed, step)
        table = torch.randint(self.places, (self.rows, self.places), generator=draw)
        order = torch.rand(table.shape, generator=draw).argsort(1)
        lines = order * self.places + table.gather(1, order)
        asked = (self.rows, self.length - self.places)
        place = torch.randint(self.places, asked, generator=draw)
        count = torch.randint(1, self.most + 1, asked, generator=draw)
        questions = self.places * (self.places + count - 1) + place
        for hop in range(self.most):
            place = torch.where(hop < count, table.gather(1, place), place)
        nothing = torch.zeros_like(lines)
        return {
            "input_ids": torch.cat([lines, questions], 1),
            "labels": torch.cat([nothing + IGNORED, place], 1),
            "hops": torch.cat([nothing, count], 1),
        }

    def variants(self) -> list[Variant]:
        """The reasoner, the backbone, an MLP."""
        sizes = {
            "n_predicates": self.n_predicates,
            "n_rules": self.n_rules,
            "reasoning_steps": self.most,
        }
        reads = {"layers": ["window"], "ssm_n_layers": 1, "window": self.length}
        return self.standard(sizes, {"loss_reason": {}}, {**reads, "window_head_dim": 16})

    def measure(self, seen: Seen) -> dict[str, float]:
        """Also the accuracy for each number of hops."""
        found = super().measure(seen)
        asked = torch.cat([batch["hops"] for batch, _ in seen])
        right = torch.cat([out.logits.argmax(-1) == batch["labels"] for batch, out in seen])
        shares = right_by_hops(asked, right)
        return found | {f"{number} hops": share for number, share in enumerate(shares, 1)}


TASK = Hops
