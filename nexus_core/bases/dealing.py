"""How the samples of a batch are assigned to processes and cells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from nexus_core.cells import edges
from nexus_core.processes import Ranks

__all__ = ["Dealing", "deal", "share"]


class Dealing(NamedTuple):
    """The samples of a batch that a process reads, cell by cell.

    Args:
        place: seed, epoch and first row of the batch.
        ids: sample ids of each cell; empty if the process has no cell in this batch.
        first: index of the first cell.
        of: number of cells in the whole batch.
    """

    place: tuple[int, int, int]
    ids: list[list[int]]
    first: int
    of: int


def share(rows: int, cells: int, ranks: Ranks) -> list[int]:
    """The row boundaries of this process's cells in a batch, first and last included.

    Args:
        rows: rows in the batch.
        cells: number of cells; 0: one per process.
        ranks: this process's rank.
    """
    count = cells or ranks.size
    low, high = edges(count, ranks.size)[ranks.rank : ranks.rank + 2]
    return edges(rows, count)[low : high + 1]


def deal(
    place: tuple[int, int, int], ids: Sequence[int], rows: int, cells: int, ranks: Ranks
) -> Dealing:
    """Split a process's share into cells, the same number in each process.

    Args:
        place: as in `Dealing`.
        ids: sample ids of the share.
        rows: rows in the batch.
        cells: number of cells.
        ranks: this process's rank.
    """
    bounds = share(rows, cells, ranks)
    parts = [list(ids[low - bounds[0] : high - bounds[0]]) for low, high in pairwise(bounds)]
    own = [part for part in parts if part]
    shares, of = edges(cells, ranks.size), min(cells, rows)
    own += [[]] * (min(shares[1], of) - len(own))
    return Dealing(place, own, shares[ranks.rank], of)
