"""Gradients of a sharded model, summed over the cells of a step in tree order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nexus_core import ConfigError, Step
from nexus_core.cells import CellSum, owned
from nexus_core.processes import Ranks

__all__ = ["CellReduction", "sum_by_tree"]


class CellReduction:
    """Replaces the reduce-scatter of a wrapped module.

    As soon as any rank has computed a cell, each rank receives its shard of that cell's gradient,
    and adds the shards as a tree. FSDP accumulates what it is given per cell: zeros, until the last
    cell gives the total.

    Args:
        ranks: this process among its peers.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._cells: Sequence[Sequence[int]] = ()  # of each process, in the order of computing
        self._summed = CellSum(0, ())
        self._step: Step | None = None
        self._place = -1  # of the cell that was summed last

    def begin(self, step: Step, count: int) -> None:
        """Start summing the cells of a step, given the number of cells per batch."""
        sizes = range(self._ranks.size)
        self._cells = [owned(step.cells, count, rank, len(sizes)) for rank in sizes]
        self._summed, self._step, self._place = CellSum(sum(step.cells), ()), step, -1

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Allocate the send and receive buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Take the part of each process's present cell, and give the sum after the last."""
        assert self._step is not None
        place = self._step.place
        if place == self._place:
            raise ConfigError(
                "fsdp reduces the gradient of a module twice in one backward pass here, which has "
                "no fixed order; set fsdp.sum to ring, or remove cells"
            )
        self._place = place
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        parts = received.view(len(self._cells), -1)
        for cells, part in zip(self._cells, parts, strict=True):
            if place < len(cells):
                self._summed.add(cells[place], [part])
        output_tensor.zero_()
        if self._step.is_last:
            (total,) = self._summed.total()
            assert total is not None
            output_tensor += total


def sum_by_tree(model: nn.Module, ranks: Ranks) -> list[CellReduction]:
    """Sum a sharded model's gradients in this order; the returned objects must be told of steps."""
    found = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            found.append(reduction := CellReduction(ranks))
            module.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]
    return found
