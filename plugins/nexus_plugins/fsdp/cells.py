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
    and adds the shards as a tree. FSDP accumulates the result of each cell: zeros, and the total
    for the last cell.

    Args:
        ranks: this process's rank.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._cells: Sequence[Sequence[int]] = ()  # cells of each rank, in order of computation
        self._summed = CellSum(0, ())
        self._step: Step | None = None
        self._place = -1  # index of the last summed cell

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
        """Exchange the shards of each rank's current cell; returns the sum after the last one."""
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
    """Sum a sharded model's gradients in tree order; `begin` each returned object per step."""
    found = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            found.append(reduction := CellReduction(ranks))
            module.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]
    return found
