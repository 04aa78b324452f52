"""Steps in cells: the same rows, random numbers and sums on any number of processes.

The rows of a batch are cut into cells of nearly equal size. A cell is what one forward and backward
pass sees, so kernels see the same shapes everywhere; its random numbers depend only on (seed, step,
cell); and sums over cells are added in a fixed order, that of a binary tree:

    cell      0   1   2   3   4   5   6
               \\ /     \\ /     \\ /    |
    level 1     +       +       +     |
                 \\     /         \\   /
    level 2         +             +
                     \\           /
    level 3               +

This module does not know about processes. Each one's part of the tree is a `CellSum`; the plugin
that runs distributed training combines them (`sum_cells`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from nexus_core.batches import Batch, batch_size, mapped
from nexus_core.device import seed_everything
from nexus_core.errors import ConfigError, DataError

__all__ = [
    "CellSum",
    "Cells",
    "Node",
    "dealt",
    "divided",
    "edges",
    "owned",
    "per_batch",
    "seed_for",
]

Node: TypeAlias = tuple[int, int]
"""A node of the tree: its level, and its index in it; a cell is `(0, cell)`."""
Values: TypeAlias = list[Tensor | None]
"""The values to sum: one tensor each, None if a cell has none."""


class Cells(NamedTuple):
    """The cells of a batch that one rank computes.

    Args:
        batches: the batch of each cell.
        rows: how many rows of each cell count: 0 if a rank without a cell of its own gets a row of
            another rank's, so that it takes part.
        first: index of the first of these cells in the batch.
        of: number of cells of the whole batch: at most one per row.
    """

    batches: tuple[Batch, ...]
    rows: tuple[int, ...]
    first: int
    of: int


class Dealing(Protocol):
    """Data that distributes the cells of its batches over ranks."""

    def in_cells(self, count: int) -> Iterable[Batch]: ...


class CellSum:
    """A running sum over the cells of a step, added as a binary tree.

    Cells may arrive in any order. Two neighbours are added as soon as both are known, so for n
    consecutive cells at most log2(n) + 1 sums are kept.

    Attributes:
        parts: sums of complete subtrees that wait for their neighbours.

    Args:
        count: number of cells of the step, over all ranks.
        like: tensors with the shapes and dtypes of the values.
    """

    def __init__(self, count: int, like: Sequence[Tensor]) -> None:
        self.count, self.like = count, like
        self.parts: dict[Node, Values] = {}

    def add(self, cell: int, values: Values) -> None:
        """Add a cell's values; the sum takes over its tensors and overwrites them."""
        self.add_part((0, cell), values)

    def add_part(self, node: Node, values: Values) -> None:
        """Add the sum of a complete subtree."""
        (level, place), neighbour = node, (node[0], node[1] ^ 1)
        while 1 << level < self.count and (
            neighbour in self.parts or neighbour[1] << level >= self.count  # beyond the last cell
        ):
            if other := self.parts.pop(neighbour, None):
                pair = (values, other) if place % 2 == 0 else (other, values)
                values = _added(*pair)
            level, place = level + 1, place // 2
            neighbour = level, place ^ 1
        self.parts[level, place] = values

    def total(self) -> Values:
        """The sum over all cells, which must all have been added."""
        (values,) = self.parts.values()
        return values


def owned(of: Sequence[int], count: int, rank: int, size: int) -> list[int]:
    """The cells of a step that one rank computes.

    Args:
        of: number of cells of each batch of the step.
        count: number of cells of a full batch.
        rank: the rank among `size`.
    """
    low, high = edges(count, size)[rank : rank + 2]
    starts = [sum(of[:place]) for place in range(len(of))]
    return [
        s + c for s, cells in zip(starts, of, strict=True) for c in range(low, min(high, cells))
    ]


def edges(count: int, parts: int) -> list[int]:
    """The boundaries of `parts` parts of `count` items; the first parts are one longer."""
    each, rest = divmod(count, parts)
    return [each * part + min(part, rest) for part in range(parts + 1)]


def per_batch(cells: int | None, accumulate: int) -> int:
    """The number of cells per batch of a step; 0: batches are not cut.

    Raises:
        ConfigError: the cells cannot be divided evenly.
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate must be at least 1, got {accumulate}")
    if cells is not None and (cells < 1 or cells % accumulate):
        raise ConfigError(
            f"cells must be a multiple of accumulate, {accumulate}, as each micro-batch is cut "
            f"into equally many, got {cells}"
        )
    return (cells or 0) // accumulate


def seed_for(seed: int, *place: object) -> None:
    """Seed all generators for a position in the run, such as a cell of a step."""
    known = hashlib.sha256(repr((seed, *place)).encode()).digest()
    seed_everything(int.from_bytes(known[:7], "little"))


def dealt(data: Iterable[Batch], count: int, processes: int) -> Iterable[Batch]:
    """The same data, with batches already in cells if the data distributes them itself.

    Raises:
        DataError: several ranks read data that does not say which rank gets which rows.
    """
    if count and hasattr(data, "in_cells"):
        return cast(Dealing, data).in_cells(count)
    if count and processes > 1:
        raise DataError(
            f"{type(data).__name__} cannot distribute cells over {processes} processes; use "
            "ResumableLoader(..., ranks=ranks), give it a method in_cells(count), or leave cells "
            "out"
        )
    return data


def divided(batch: Batch, count: int) -> Cells:
    """The cells of a batch that this rank computes: those assigned to it, or all."""
    if isinstance(batch, Cells):
        return batch
    rows = batch_size(batch)[0]
    bounds = list(pairwise(edges(rows, min(count, rows))))
    parts = tuple(_rows(batch, rows, *between) for between in bounds)
    return Cells(parts, tuple(high - low for low, high in bounds), 0, len(bounds))


def _rows(batch: Batch, total: int, low: int, high: int) -> Batch:
    def cut(leaf: Any) -> Any:
        by_row = isinstance(leaf, Tensor | np.ndarray) and leaf.ndim and len(leaf) == total
        return leaf[low:high] if by_row else leaf

    part = mapped(batch, cut)
    if isinstance(batch, dict):
        lists = {k: v for k, v in batch.items() if isinstance(v, list) and len(v) == total}
        part |= {key: value[low:high] for key, value in lists.items()}
    if batch_size(part)[0] != high - low:
        raise DataError(
            f"a batch of type {type(batch).__name__} cannot be cut into cells; make it of tensors "
            "with an entry per row, in dicts, lists or tuples, or leave cells out"
        )
    return part


@torch.no_grad()
def _added(left: Values, right: Values) -> Values:
    """The sums, added in place to dense left values."""
    dense = [
        (a, b)
        for a, b in zip(left, right, strict=True)
        if not (a is None or b is None or a.is_sparse or b.is_sparse)
    ]
    if dense:
        torch._foreach_add_([a for a, _ in dense], [b for _, b in dense])
    return list(map(_sum, left, right))


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    if left.is_sparse and right.is_sparse:
        return (left + right).coalesce()
    if left.is_sparse or right.is_sparse:
        return right + left if left.is_sparse else left + right
    return left  # added in place
