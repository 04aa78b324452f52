"""Gradients of a divided model, summed over the cells of a step in the order of their tree."""

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
    """Stands in for the reduce-scatter of a module whose weights are gathered together.

    Each process gets, of each cell as soon as it is computed anywhere, its part of the gradient,
    and adds these as a tree. FSDP adds up what it is given over the cells: nothing, until the last
    cell gives the sum of all.

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
        """Sum from here on the cells of a step whose batches have so many each."""
        sizes = range(self._ranks.size)
        self._cells = [owned(step.cells, count, rank, len(sizes)) for rank in sizes]
        self._summed, self._step, self._place = CellSum(sum(step.cells), ()), step, -1

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for what is sent and for what comes back."""
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
    """Have the gradients of a divided model be summed so; what is returned is told of steps."""
    found = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            found.append(reduction := CellReduction(ranks))
            module.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]
    return found
