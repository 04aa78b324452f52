"""This process among its peers: its rank, how many there are, sums over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """The position of this process in the job.

    Args:
        rank: from 0; rank 0 owns the run folder, the console and the loggers.
        size: how many processes train together.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Read the position from `torch.distributed`, or one process where it is not running."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process owns what exists once per run."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes (the tensor itself for one process)."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))).item())
