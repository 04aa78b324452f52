"""Sums over cells that several processes have parts of: one order, whoever adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_core.cells import CellSum, Node, owned
from nexus_core.processes import Ranks, gather
from nexus_core.step import Step

__all__ = ["Nodes", "nodes_of", "slice_sum", "sum_over_processes"]

Nodes = list[list[Node]]
"""The whole subtrees that each process has the sums of, by rank."""

_ABSENT, _SPARSE, _DENSE = 0, 1, 2
_NOTHING = -0.0  # added to any number it leaves the number, the sign of a zero too


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
    """The sum over all cells of a step, in every process.

    Args:
        part: what this process has of it.
        step: whose cells are summed.
        count: cells of a whole batch.
        ranks: this process among its peers; all of them ask, for the same tensors.
        bucket: bytes that are sent at once.
        ring: add as the backend does, so that the order depends on the number of processes.

    Returns:
        A tensor of its own memory for each, None for what no cell has.
    """
    nodes = [] if ring else nodes_of(step.cells, count, ranks.size)
    kinds = torch.tensor([max(map(_kind, column), default=0) for column in _columns(part)])
    dist.all_reduce(kinds, dist.ReduceOp.MAX)
    found: list[Tensor | None] = [None] * len(part.like)
    for place, kind in enumerate(kinds.tolist()):
        if kind == _SPARSE:
            found[place] = _sparse_total(part, place, ranks)
    dense = [place for place, kind in enumerate(kinds.tolist()) if kind == _DENSE]
    for places in _buckets(part.like, dense, bucket):
        like = [part.like[place] for place in places]
        flat = {node: _flat([part.parts[node][p] for p in places], like) for node in part.parts}
        size = sum(tensor.numel() for tensor in like)
        whole = _whole(flat, size, like[0], nodes, ranks)
        for place, tensor, values in zip(
            places, like, torch.split(whole[:size], [t.numel() for t in like]), strict=True
        ):
            found[place] = torch.empty_like(tensor, requires_grad=False).copy_(
                values.view(tensor.shape)
            )
    return found


def nodes_of(of: Sequence[int], count: int, size: int) -> Nodes:
    """Of each process the subtrees that its cells fill.

    Args:
        of: how many cells each batch of the step has.
        count: how many a whole batch has.
        size: how many processes there are.
    """
    found: Nodes = []
    for rank in range(size):
        own = CellSum(sum(of), ())
        for cell in owned(of, count, rank, size):
            own.add(cell, [])
        found.append(sorted(own.parts))
    return found


def slice_sum(received: Sequence[Tensor], nodes: Nodes, cells: int) -> Tensor:
    """The sum of what the processes have sent of one slice: `(subtrees, slice)` of each."""
    summed = CellSum(cells, ())
    for sent, own in zip(received, nodes, strict=True):
        for node, values in zip(own, sent, strict=True):
            summed.add_part(node, [values])
    (total,) = summed.total()
    assert total is not None
    return total


def _whole(flat: dict[Node, Tensor], size: int, like: Tensor, nodes: Nodes, ranks: Ranks) -> Tensor:
    """The sum of flat tensors over the tree, padded to a multiple of the processes."""
    padded = -(-size // ranks.size) * ranks.size
    sent = torch.full((len(flat), padded), _NOTHING, dtype=like.dtype, device=like.device)
    for row, node in zip(sent, sorted(flat), strict=True):
        row[:size] = flat[node]
    if not nodes:
        total = sent.sum(0)
        dist.all_reduce(total)
        return total
    if _is_even(nodes):
        return _by_halves(sent[0], ranks)
    own = padded // ranks.size
    shares = sent.view(len(flat), ranks.size, own).transpose(0, 1).contiguous()
    received = shares.new_empty(sum(map(len, nodes)) * own)
    sizes = [len(there) * own for there in nodes]
    dist.all_to_all_single(received, shares.view(-1), sizes, [len(flat) * own] * ranks.size)
    cells = max(place + 1 << level for there in nodes for level, place in there)
    parts = [part.view(-1, own) for part in torch.split(received, sizes)]
    total = slice_sum(parts, nodes, cells)
    whole = total.new_empty(padded)
    dist.all_gather(list(torch.split(whole, own)), total.contiguous())
    return whole


def _is_even(nodes: Nodes) -> bool:
    """Whether each process has one subtree, all of a size, and the tree goes on by twos."""
    level = nodes[0][0][0] if nodes[0] else 0
    even = all(there == [(level, rank)] for rank, there in enumerate(nodes))
    return even and len(nodes) & (len(nodes) - 1) == 0


def _by_halves(values: Tensor, ranks: Ranks) -> Tensor:
    """The sum of one tensor of each process, by recursive halving and doubling, in place.

    Neighbours add first, then neighbouring pairs: the tree's own order.
    """
    low, high, steps = 0, len(values), list[tuple[int, int, int]]()
    distance = 1
    while distance < ranks.size:
        middle, upper = (low + high) // 2, bool(ranks.rank & distance)
        steps.append((distance, low, high))
        given, kept = ((low, middle), (middle, high))[:: 1 if upper else -1]
        theirs = torch.empty_like(values[slice(*kept)])
        _swap(values[slice(*given)], theirs, ranks.rank ^ distance)
        values[slice(*kept)] += theirs
        (low, high), distance = kept, 2 * distance
    for distance, first, last in reversed(steps):
        other = (high, last) if low == first else (first, low)
        theirs = torch.empty_like(values[slice(*other)])
        _swap(values[low:high], theirs, ranks.rank ^ distance)
        values[slice(*other)] = theirs
        low, high = first, last
    return values


def _swap(ours: Tensor, theirs: Tensor, peer: int) -> None:
    swaps = [dist.P2POp(dist.isend, ours, peer), dist.P2POp(dist.irecv, theirs, peer)]
    for work in dist.batch_isend_irecv(swaps):
        work.wait()


def _columns(part: CellSum) -> Iterator[list[Tensor | None]]:
    """Of each tensor that is summed, what the subtrees have."""
    return ([values[place] for values in part.parts.values()] for place in range(len(part.like)))


def _kind(values: Tensor | None) -> int:
    return _ABSENT if values is None else _SPARSE if values.is_sparse else _DENSE


def _flat(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All in a row; where there is nothing, what adds nothing."""
    return torch.cat([
        torch.full_like(shape, _NOTHING, requires_grad=False).view(-1)
        if tensor is None
        else (tensor.to_dense() if tensor.is_sparse else tensor).reshape(-1)
        for tensor, shape in zip(values, like, strict=True)
    ])  # fmt: skip


def _buckets(like: Sequence[Tensor], places: Sequence[int], most: float) -> Iterator[list[int]]:
    """The tensors to send together: of one type and device, up to so many bytes."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place in places:
        kinds.setdefault((like[place].dtype, like[place].device), []).append(place)
    for alike in kinds.values():
        sizes = accumulate(like[place].nbytes for place in alike)
        numbers = [int(size // most) for size in sizes]
        cuts = [n for n, (a, b) in enumerate(pairwise(numbers), start=1) if a != b]
        for low, high in pairwise([0, *cuts, len(alike)]):
            yield alike[low:high]


def _sparse_total(part: CellSum, place: int, ranks: Ranks) -> Tensor | None:
    own = {node: [values[place]] for node, values in part.parts.items()}
    summed = CellSum(part.count, ())
    for there in gather(ranks, own):
        for node, values in there.items():
            summed.add_part(node, values)
    return summed.total()[0]
