"""Questions whose answer is reached in a number of equal steps, each given as one vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nexus_plugins.modules.puzzles import hops

__all__ = ["CHAINS", "MOST", "Chains", "Hops", "Horn", "Modular", "Questions"]

MOST = 3
"""The most steps of a question that is trained on."""

Questions = tuple[Tensor, Tensor]
"""`(B, size)` the questions, and `(B,)` the answers."""


class Chains(ABC):
    """A kind of question, of 1 to `MOST` steps or one step more.

    Args:
        seed: determines the rules.
    """

    size: int
    """Numbers in a question."""
    answers: int
    """Number of possible answers."""

    @abstractmethod
    def __init__(self, seed: int) -> None: ...

    @abstractmethod
    def drawn(self, draw: Generator, rows: int, further: bool) -> Questions:
        """Random questions.

        Args:
            draw: the random generator.
            rows: B.
            further: questions of `MOST + 1` steps, instead of 1 to `MOST`.
        """


class Hops(Chains):
    """Function composition: a table of six places is applied 1 to 3 times to a start.

    Each question has its own table, so no answer can be memorized.
    """

    PLACES: ClassVar[int] = 6

    def __init__(self, seed: int) -> None:
        self.size, self.answers = self.PLACES**2 + self.PLACES + 1, self.PLACES

    def drawn(self, draw: Generator, rows: int, further: bool) -> Questions:
        """Table and start one-hot, and half the number of applications."""
        steps = (MOST + 1, MOST + 1) if further else (MOST, 1)
        made = hops(draw, rows, 1, self.PLACES, *steps)
        return made["question"][:, 0], made["labels"][:, 0]


class Modular(Chains):
    """Modular arithmetic: the sum modulo 3 of 1 to 3 neighbours in a ring of six digits.

    Each step adds the next digit; every digit is within the reach of three steps from some start.
    """

    DIGITS: ClassVar[int] = 6
    MODULUS: ClassVar[int] = 3

    def __init__(self, seed: int) -> None:
        self.size, self.answers = self.DIGITS * (self.MODULUS + 1) + 1, self.MODULUS

    def drawn(self, draw: Generator, rows: int, further: bool) -> Questions:
        """Digits and start one-hot, and half the number of digits to add."""
        digits = torch.randint(self.MODULUS, (rows, self.DIGITS), generator=draw)
        start = torch.randint(self.DIGITS, (rows, 1), generator=draw)
        least, most = (MOST + 1, MOST + 1) if further else (1, MOST)
        steps = torch.randint(least, most + 1, (rows, 1), generator=draw)
        step = torch.arange(most)
        total = (digits.gather(1, (start + step) % self.DIGITS) * (step < steps)).sum(1)
        one_hot = (F.one_hot(digits, self.MODULUS), F.one_hot(start, self.DIGITS))
        question = [part.flatten(1) for part in one_hot] + [steps / 2]
        return torch.cat(question, 1), total % self.MODULUS


class Horn(Chains):
    """Fixed Horn rules: whether an atom follows from facts by forward chaining.

    The rules "if A and B, then C" are drawn from the seed, and the facts for each question. Half of
    the atoms asked about follow, after as many rounds as the question is to have steps; the others
    never do.
    """

    ATOMS: ClassVar[int] = 16
    RULES: ClassVar[int] = 24
    SHARE: ClassVar[float] = 0.25
    """Of the atoms that are facts."""

    def __init__(self, seed: int) -> None:
        self.size, self.answers = 2 * self.ATOMS, 2
        draw = torch.Generator().manual_seed(seed)
        self.rules = torch.rand((self.RULES, self.ATOMS), generator=draw).argsort(1)[:, :3]

    def drawn(self, draw: Generator, rows: int, further: bool) -> Questions:
        """The facts, and the atom asked about one-hot."""
        facts = torch.rand((max(512, rows), self.ATOMS), generator=draw) < self.SHARE
        depth = depths(facts, self.rules)
        wanted = [MOST + 1] if further else list(range(1, MOST + 1))
        kinds = [-1] * len(wanted) + wanted
        picked = []
        for kind in kinds:
            cases = (depth == kind).nonzero()
            count = -(-rows // len(kinds))
            picked.append(cases[torch.randint(len(cases), (count,), generator=draw)])
        row, atom = torch.cat(picked)[:rows].unbind(1)
        question = torch.cat([facts[row], F.one_hot(atom, self.ATOMS)], 1).float()
        return question, (depth[row, atom] > 0).long()


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


CHAINS: dict[str, type[Chains]] = {"hops": Hops, "horn": Horn, "modular": Modular}
