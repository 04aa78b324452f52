"""Which samples of a batch a process reads, and in which cells."""

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
        place: of the batch: the seed, the epoch and its first row.
        ids: of each cell; none where a process takes part without a cell of its own.
        first: the number of the first cell.
        of: how many cells the whole batch has.
    """

    place: tuple[int, int, int]
    ids: list[list[int]]
    first: int
    of: int


def share(rows: int, cells: int, ranks: Ranks) -> list[int]:
    """Where the share of a process in so many rows begins and ends, and its cells between.

    Args:
        rows: of the batch.
        cells: that it is cut into; 0: as many as there are processes.
        ranks: this process among its peers.
    """
    count = cells or ranks.size
    low, high = edges(count, ranks.size)[ranks.rank : ranks.rank + 2]
    return edges(rows, count)[low : high + 1]


def deal(
    place: tuple[int, int, int], ids: Sequence[int], rows: int, cells: int, ranks: Ranks
) -> Dealing:
    """The share of a process in its cells, as many in each process.

    Args:
        place: as in `Dealing`.
        ids: of the samples of the share.
        rows: of the batch, `cells` and `ranks`: as for `share`.
        cells: that it is cut into.
        ranks: this process among its peers.
    """
    bounds = share(rows, cells, ranks)
    parts = [list(ids[low - bounds[0] : high - bounds[0]]) for low, high in pairwise(bounds)]
    own = [part for part in parts if part]
    shares, of = edges(cells, ranks.size), min(cells, rows)
    own += [[]] * (min(shares[1], of) - len(own))
    return Dealing(place, own, shares[ranks.rank], of)
