"""Sums over cells that are distributed over ranks, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_core.cells import CellSum, Node, owned
from nexus_core.processes import Ranks, gather
from nexus_core.step import Step

__all__ = [
    "DENSE",
    "NOTHING",
    "Exchange",
    "Nodes",
    "buckets",
    "columns",
    "empty",
    "flat_rows",
    "kind_of",
    "nodes_of",
    "padded",
    "slice_sum",
    "sum_over_processes",
]

Nodes = list[list[Node]]
"""The complete subtrees whose sums each process has, by rank."""

ABSENT, SPARSE, DENSE = 0, 1, 2
NOTHING = -0.0
"""The neutral element of addition, which also preserves the sign of zero."""
_ALIGNED = 64  # a process's share is a multiple of this many numbers
_TAGS = 4096  # per exchange


@torch.no_grad()
def sum_over_processes(
    part: CellSum,
    step: Step,
    count: int,
    ranks: Ranks,
    bucket: float = 2**25,
    *,
    ring: bool = False,
) -> list[Tensor | None]:
    """The sum over all cells of a step, on every rank.

    Args:
        part: the part of this process.
        step: the step whose cells are summed.
        count: number of cells of a full batch.
        ranks: this process's rank; every rank must call this, for the same tensors.
        bucket: bytes sent at once.
        ring: add as the backend does, so that the order depends on the number of processes.

    Returns:
        A new tensor for each; None if no cell has it.
    """
    nodes = [] if ring else nodes_of(step.cells, count, ranks.size)
    kinds = torch.tensor([max(map(kind_of, column), default=0) for column in columns(part)])
    dist.all_reduce(kinds, dist.ReduceOp.MAX)
    found: list[Tensor | None] = [None] * len(part.like)
    for place, kind in enumerate(kinds.tolist()):
        if kind == SPARSE:
            found[place] = _sparse_total(part, place, ranks)
    dense = [place for place, kind in enumerate(kinds.tolist()) if kind == DENSE]
    for places in buckets(part.like, dense, bucket):
        like = [part.like[place] for place in places]
        exchange = Exchange(flat_rows(part, places, ranks), nodes, ranks, empty(like, ranks))
        exchange.begin()
        exchange.middle()
        exchange.end()
        numbers = [tensor.numel() for tensor in like]
        values = torch.split(exchange.out[: sum(numbers)], numbers)
        for place, tensor, value in zip(places, like, values, strict=True):
            found[place] = torch.empty_like(tensor, requires_grad=False).copy_(
                value.view(tensor.shape)
            )
    return found


class Exchange:
    """A pending sum of one flat tensor over the subtrees of all processes.

    All processes call `begin`, `middle` and `end` in the same order; several sums may be pending at
    once. Each process gets its share of every subtree, adds these in the order of the tree, and
    sends the sum to all: the traffic of a ring all-reduce if each has one subtree. Two processes
    with one each use the backend's own sum, as a + b equals b + a.

    Attributes:
        out: the sum, once `end` has been called; in the memory of the first row, if there is one.

    Args:
        rows: the flat sums of this process's subtrees, of `padded` length; overwritten.
        nodes: the subtrees of all processes; empty: use the backend's own sum.
        ranks: this process's rank.
        out: memory for the sum if there is no row.
        room: memory for what is received, or None; too little is replaced.
        number: distinguishes it from other pending sums.
    """

    def __init__(
        self,
        rows: Mapping[Node, Tensor],
        nodes: Nodes,
        ranks: Ranks,
        out: Tensor,
        room: Tensor | None = None,
        number: int = 0,
    ) -> None:
        self._nodes, self._ranks, self._tag = nodes, ranks, number * _TAGS
        self._rows = [rows[node] for node in sorted(rows)]
        self.out = self._rows[0] if self._rows else out
        self._share = len(self.out) // ranks.size
        two = ranks.size == 2 and all(len(there) == 1 for there in nodes)
        self._by_backend = not nodes or (two and out.dtype in (torch.float32, torch.float64))
        self.room = room
        self._work: list[dist.Work] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Send each rank its share of the rows."""
        if self._by_backend:
            for row in self._rows[1:]:
                self.out += row
            if not self._rows:
                self.out.fill_(NOTHING)
            if (work := dist.all_reduce(self.out, async_op=True)) is not None:
                self._work = [work]
            return
        need = sum(len(there) for _, there in self._others()) * self._share
        if self.room is None or len(self.room) < need or not _alike(self.room, self.out):
            self.room = self.out.new_empty(need)
        self._received = iter(torch.split(self.room[:need], self._share)) if need else iter(())
        shares = {rank: [next(self._received) for _ in there] for rank, there in self._others()}
        self._shares = shares
        self._swap(
            {rank: [row[self._slice(rank)] for row in self._rows] for rank, _ in self._others()},
            shares,
            0,
        )

    @torch.no_grad()
    def middle(self) -> None:
        """Add up this rank's share in tree order, and send it to all ranks."""
        if self._by_backend:
            return
        self._wait()
        own = self._slice(self._ranks.rank)
        mine = [row[own] for row in self._rows]
        parts = [self._shares.get(rank, mine) for rank in range(self._ranks.size)]
        cells = max(place + 1 << level for there in self._nodes for level, place in there)
        total = slice_sum(parts, self._nodes, cells)
        if total.data_ptr() != self.out[own].data_ptr():
            self.out[own] = total
        others = [rank for rank, _ in self._others()]
        self._swap(
            {rank: [self.out[own]] for rank in others},
            {rank: [self.out[self._slice(rank)]] for rank in others},
            _TAGS // 2,
        )

    def end(self) -> None:
        """Wait for the sum."""
        self._wait()

    def _others(self) -> list[tuple[int, list[Node]]]:
        return [(r, there) for r, there in enumerate(self._nodes) if r != self._ranks.rank]

    def _slice(self, rank: int) -> slice:
        return slice(rank * self._share, (rank + 1) * self._share)

    def _swap(
        self, sent: Mapping[int, list[Tensor]], received: Mapping[int, list[Tensor]], tag: int
    ) -> None:
        """Send tensors to each process, and receive some, without waiting."""
        swaps = [
            dist.P2POp(way, tensor, rank, tag=self._tag + tag + place)
            for way, tensors in ((dist.irecv, received), (dist.isend, sent))
            for rank, there in tensors.items()
            for place, tensor in enumerate(there)
        ]
        self._work = dist.batch_isend_irecv(swaps) if swaps else []

    def _wait(self) -> None:
        for work in self._work:
            work.wait()
        self._work = []


def nodes_of(of: Sequence[int], count: int, size: int) -> Nodes:
    """The subtrees that each process's cells fill.

    Args:
        of: number of cells of each batch of the step.
        count: number of cells of a full batch.
        size: number of processes.
    """
    found: Nodes = []
    for rank in range(size):
        own = CellSum(sum(of), ())
        for cell in owned(of, count, rank, size):
            own.add(cell, [])
        found.append(sorted(own.parts))
    return found


def slice_sum(received: Sequence[Sequence[Tensor]], nodes: Nodes, cells: int) -> Tensor:
    """The sum of the tensors received for one slice, one for each subtree."""
    summed = CellSum(cells, ())
    for sent, own in zip(received, nodes, strict=True):
        for node, values in zip(own, sent, strict=True):
            summed.add_part(node, [values])
    (total,) = summed.total()
    assert total is not None
    return total


def padded(numbers: int, ranks: Ranks) -> int:
    """The padded length of a flat tensor, so that it divides evenly among ranks."""
    unit = _ALIGNED * ranks.size
    return -(-numbers // unit) * unit


def kind_of(values: Tensor | None) -> int:
    """Whether there is a tensor, and its dtype, device and layout."""
    return ABSENT if values is None else SPARSE if values.is_sparse else DENSE


def buckets(like: Sequence[Tensor], places: Sequence[int], most: float) -> Iterator[list[int]]:
    """The tensors to send together: of one dtype and device, up to the bucket size."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place in places:
        kinds.setdefault((like[place].dtype, like[place].device), []).append(place)
    for alike in kinds.values():
        sizes = accumulate(like[place].nbytes for place in alike)
        numbers = [int(size // most) for size in sizes]
        cuts = [n for n, (a, b) in enumerate(pairwise(numbers), start=1) if a != b]
        for low, high in pairwise([0, *cuts, len(alike)]):
            yield alike[low:high]


def columns(part: CellSum) -> Iterator[list[Tensor | None]]:
    """For each tensor to sum, the values of the subtrees."""
    return ([values[place] for values in part.parts.values()] for place in range(len(part.like)))


def empty(like: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Memory for tensors laid out one after another."""
    numbers = padded(sum(tensor.numel() for tensor in like), ranks)
    return torch.empty(numbers, dtype=like[0].dtype, device=like[0].device)


def flat_rows(part: CellSum, places: Sequence[int], ranks: Ranks) -> dict[Node, Tensor]:
    """The tensors of each subtree laid out one after another; missing ones are `NOTHING`."""
    like, rows = [part.like[place] for place in places], dict[Node, Tensor]()
    for node, values in part.parts.items():
        row = rows[node] = empty(like, ranks).fill_(NOTHING)
        for place, target in zip(
            places, torch.split(row[: sum(t.numel() for t in like)], [t.numel() for t in like]),
            strict=True,
        ):  # fmt: skip
            if (value := values[place]) is not None:
                target.view(value.shape).copy_(value.to_dense() if value.is_sparse else value)
    return rows


def _sparse_total(part: CellSum, place: int, ranks: Ranks) -> Tensor | None:
    own = {node: [values[place]] for node, values in part.parts.items()}
    summed = CellSum(part.count, ())
    for there in gather(ranks, own):
        for node, values in there.items():
            summed.add_part(node, values)
    return summed.total()[0]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether one can be received into the memory of the other."""
    return one.dtype == other.dtype and one.device == other.device
