"""The source of each row of a run, as a pure function of the seed and the row's index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nexus_core import ConfigError
from nexus_core.bases.loader import permute

__all__ = ["Mixture", "MixtureOrder", "Ramp"]

Ids = NDArray[np.int64]
_BLOCK = 256  # rows per random permutation
_STRIDE = 1 << 16  # rows between stored counts
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Ramp:
    """The weight of a source over the run: linear between points, constant outside.

    Args:
        rows: number of rows so far at each point, ascending.
        weights: weights at the points.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass
class Mixture:
    """The source of each row, counted from the start of the run.

    Rows are assigned in blocks of 256: in each block every source has its share by the current
    weights, to within one row, in a random order. So shares hold throughout the run, and the source
    of a row, and how many rows of each source precede it, are functions of the seed and the row's
    index.

    Args:
        ramps: the weight of each source.
        seed: seed of the order.

    Raises:
        ConfigError: all weights are 0 at some point.
    """

    ramps: Sequence[Ramp]
    seed: int
    _counts: list[Ids] = field(default_factory=list)

    def __post_init__(self) -> None:
        edges = np.unique(np.concatenate([np.array(ramp.rows) for ramp in self.ramps]))
        if not (self._weights(edges).sum(axis=0) > 0).all():
            raise ConfigError(
                "the weights of all sources are 0 at the same time; raise one of them there"
            )
        self._counts = [np.zeros(len(self.ramps), np.int64)]

    def sources(self, first: int, last: int) -> Ids:
        """The source of the rows `first` to `last - 1`."""
        if last <= first:
            return np.zeros(0, np.int64)
        blocks = np.arange(first // _BLOCK, -(-last // _BLOCK), dtype=np.int64)
        rows = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).astype(np.uint64)
        keys = _hashed(rows, self.seed)
        places = keys.argsort(axis=1).argsort(axis=1)
        shift = _hashed(blocks.astype(np.uint64)[:, None], self.seed + 1) / np.float64(2**64)
        lots = ((places + shift) / _BLOCK).reshape(-1)
        edges = self._weights(rows.reshape(-1).astype(np.int64)).cumsum(axis=0)
        found: Ids = (lots >= edges[:-1] / edges[-1]).sum(axis=0, dtype=np.int64)
        return found[first - int(blocks[0]) * _BLOCK :][: last - first]

    def counts(self, row: int) -> Ids:
        """The number of rows of each source before a row."""
        while len(self._counts) <= row // _STRIDE:
            begin = (len(self._counts) - 1) * _STRIDE
            self._counts.append(self._counts[-1] + self._tally(begin, begin + _STRIDE))
        begin = row // _STRIDE * _STRIDE
        return self._counts[row // _STRIDE] + self._tally(begin, row)

    def locate(self, first: int, last: int) -> tuple[Ids, Ids]:
        """The source of the rows `first` to `last - 1`, and the index of each within its source."""
        sources, counts = self.sources(first, last), self.counts(first)
        draws = np.empty_like(sources)
        for number, before in enumerate(counts.tolist()):
            mine = sources == number
            draws[mine] = before + np.arange(int(mine.sum()))
        return sources, draws

    def _tally(self, first: int, last: int) -> Ids:
        return np.bincount(self.sources(first, last), minlength=len(self.ramps)).astype(np.int64)

    def _weights(self, rows: Ids) -> NDArray[np.float64]:
        """`(sources, rows)`, the weight of each source at each row."""
        return np.stack([np.interp(rows, ramp.rows, ramp.weights) for ramp in self.ramps])


@dataclass(frozen=True)
class MixtureOrder:
    """The order of a mixture's rows, for `ResumableLoader`; each source has its own permutation.

    Args:
        mixture: the source of each row.
        sizes: number of rows of each source.
    """

    mixture: Mixture
    sizes: tuple[int, ...]

    def __call__(self, places: Ids, size: int, seed: int, epoch: int) -> Ids:
        """The sample, in 0..size-1, at each position of an epoch; sources are concatenated."""
        if not len(places):
            return places
        first, last = int(places.min()), int(places.max()) + 1
        begin = epoch * size
        sources, draws = self.mixture.locate(begin + first, begin + last)
        sources, draws = sources[places - first], draws[places - first]
        samples = np.empty_like(places)
        offset = 0
        for number, rows in enumerate(self.sizes):
            mine = np.flatnonzero(sources == number)
            rounds, within = np.divmod(draws[mine], rows)
            for turn in np.unique(rounds).tolist():
                now = mine[rounds == turn]
                picked = permute(within[rounds == turn], rows, seed + number, turn)
                samples[now] = offset + picked
            offset += rows
        return samples


def _hashed(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """SplitMix64 of a seed and a number (Steele, Lea and Flood 2014)."""
    mixed = values + np.array([_GOLDEN * (seed * 2 + 1) % (1 << 64)], np.uint64)
    for _ in range(2):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
