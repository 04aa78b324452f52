"""Fixed Horn rules: whether an atom follows from facts by forward chaining."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from benchmarks.chains import Chain
from benchmarks.tasks.task import IGNORED, Batch, generator
from nexus_plugins.model_nexus import NEXUSCore

__all__ = ["TASK", "Horn", "depths"]


@dataclass(frozen=True)
class Horn(Chain):
    """Each document lists facts, in random order, and asks which other atoms follow.

    The rules "if A and B, then C" are drawn from the seed. An atom that follows takes as many steps
    as rounds of forward chaining. Half of the answers that count are "follows".
    """

    name: ClassVar[str] = "horn"

    rows: int = 32
    atoms: int = 16
    rules: int = 24
    facts: int = 4
    """Of a document."""

    @property
    def vocab_size(self) -> int:
        """A token for each fact, each question, no and yes."""
        return 2 * self.atoms + 2

    def drawn(self, seed: int, draw: Generator, further: bool) -> Batch:
        """Facts and questions."""
        size = self.facts + self.atoms
        many = self.documents(size)
        order = torch.rand((self.rows * many, self.atoms), generator=draw).argsort(1)
        listed = order[:, : self.facts]
        known = torch.zeros_like(order, dtype=torch.bool).scatter(1, listed, True)
        asked = torch.rand(order.shape, generator=draw).argsort(1)
        depth = depths(known, self.drawn_rules(seed)).gather(1, asked)
        follows = depth == self.most + 1 if further else (depth > 0) & (depth <= self.most)
        never = (depth == -1) & (torch.rand(depth.shape, generator=draw) < _odds(follows, depth))
        answer = 2 * self.atoms + follows.long()
        labels = answer.where(follows | never, IGNORED)
        nothing = torch.full_like(listed, IGNORED)
        segments = torch.arange(many).repeat_interleave(size)
        return {
            "input_ids": torch.cat([listed, self.atoms + asked], 1).view(self.rows, -1),
            "labels": torch.cat([nothing, labels], 1).view(self.rows, -1),
            "segment_ids": segments.expand(self.rows, -1),
        }

    def timed(self, model: NEXUSCore, seed: int) -> dict[str, float]:
        """Also the nats of who knows only which atom is asked about."""
        measures = super().timed(model, seed)
        for name, further in (("atom alone", False), ("one step further: atom alone", True)):
            batch = replace(self, rows=8 * self.rows).drawn(seed, generator(seed, -1), further)
            counts = batch["labels"] != IGNORED
            asked = batch["input_ids"][counts] - self.atoms
            yes = (batch["labels"][counts] == 2 * self.atoms + 1).double()
            share = yes.new_zeros(self.atoms).scatter_reduce(
                0, asked, yes, "mean", include_self=False
            )
            measures[f"{name}: nats"] = F.binary_cross_entropy(share[asked], yes).item()
        return measures

    def drawn_rules(self, seed: int) -> Tensor:
        """The rules of a seed, `(rules, 3)`: two premises and a conclusion."""
        return torch.rand((self.rules, self.atoms), generator=generator(seed)).argsort(1)[:, :3]


def _odds(follows: Tensor, depth: Tensor) -> float:
    """The share of the atoms that never follow which is as many as those that follow."""
    return follows.sum().item() / max(1, int((depth == -1).sum()))


def depths(facts: Tensor, rules: Tensor) -> Tensor:
    """After how many rounds of forward chaining each atom follows: 0 for facts, -1 for never.

    Args:
        facts: `(N, atoms)`, bool.
        rules: `(rules, 3)`, two premises and a conclusion.
    """
    known, depth = facts.clone(), torch.where(facts, 0, -1)
    first, second, conclusion = rules.unbind(1)
    for number in range(1, facts.shape[1] + 1):
        fires = known[:, first] & known[:, second]
        counted = torch.zeros_like(depth).index_add(1, conclusion, fires.long())
        new = (counted > 0) & ~known
        if not new.any():
            break
        depth[new] = number
        known |= new
    return depth


TASK = Horn
