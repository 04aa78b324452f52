"""Function composition: follow 1, 2, ... jumps through the document's own table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from benchmarks.chains import Chain
from benchmarks.tasks.task import Batch
from nexus_plugins.modules.puzzles import hops

__all__ = ["TASK", "Hops"]


@dataclass(frozen=True)
class Hops(Chain):
    """Each document has a table of which place leads to which; see `puzzles.hops`."""

    name: ClassVar[str] = "hops"

    places: int = 6

    @property
    def vocab_size(self) -> int:
        """A token for each possible line of a table, for each place, and the one that asks."""
        return self.places**2 + self.places + 1

    def drawn(self, seed: int, draw: Generator, further: bool) -> Batch:
        """Tables and chains."""
        steps = (self.most + 1, self.most + 1) if further else (self.most, 1)
        return hops(draw, self.rows, self.length, self.places, *steps)


TASK = Hops
