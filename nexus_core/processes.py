"""This process among its peers: rank, size, sums over all of them; and its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_core.errors import ConfigError

__all__ = ["Ranks", "pick_device"]


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the job; rank 0 owns run folder, console and loggers."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As `torch.distributed` says; one process where it is not running."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process owns what exists once per run."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes; the tensor itself in a single one."""
        if self.size > 1:
            tensor = tensor.detach().clone()
            dist.all_reduce(tensor)
        return tensor


def pick_device(wish: str | torch.device | None, model: nn.Module | None) -> torch.device:
    """The device to train on: "auto" is an accelerator if there is one, None the model's own.

    Raises:
        ConfigError: this machine has no such device.
    """
    if wish is None:
        parameter = next(model.parameters(), None) if model is not None else None
        return parameter.device if parameter is not None else torch.device("cpu")
    if wish == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=wish).device
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"cannot use the device '{wish}': {said}; try device=auto") from error
