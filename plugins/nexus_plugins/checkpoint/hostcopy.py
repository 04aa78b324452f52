"""Copy a state to host memory, quickly, because training waits for it.

All tensors go into one block of memory that is reused by the next save: copying into memory that
has been touched before is several times faster. On an accelerator the block is page-locked and the
copies are queued after the step, so the host does not wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["HostCopy"]

_ALIGNMENT = 64


class HostCopy:
    """Copies tensors into its own memory, which it reuses."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._queued: list[torch.Event] = []

    def reserve(self, tensors: Iterable[Tensor], spare: int = 0) -> None:
        """Allocate memory for such tensors, which takes longer than copying them.

        Args:
            tensors: tensors of the same number and sizes as those to be copied.
            spare: additional bytes.
        """
        listed = list(tensors)
        size = spare + sum(_space(tensor) for tensor in listed)
        if size > self._block.numel():
            pinned = any(_is_queued(tensor) for tensor in listed)
            self._block = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self._block.numpy().fill(0)

    def copy(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of all tensors, valid until the next call; call `wait` before reading them."""
        self.reserve(tensor for group in groups.values() for tensor in group.values())
        copies: dict[str, dict[str, Tensor]] = {name: {} for name in groups}
        place = 0
        for name, group in groups.items():
            for key, tensor in group.items():
                copies[name][key] = self._copy(tensor, place)
                place += _space(tensor)
        listed = [tensor for group in groups.values() for tensor in group.values()]
        for device in {tensor.device for tensor in listed if _is_queued(tensor)}:
            event = torch.get_device_module(device).Event()
            event.record()
            self._queued.append(event)
        return copies

    def wait(self) -> None:
        """Wait until the copies hold the tensors' values at the time of `copy`."""
        while self._queued:
            self._queued.pop().synchronize()

    def _copy(self, tensor: Tensor, place: int) -> Tensor:
        room = self._block[place : place + tensor.nbytes]
        target = room.view(tensor.dtype).view(tensor.shape)
        if _is_plain(tensor):
            # one memcpy: torch's copy would share the work with threads and wait for all of them,
            # which takes many times as long while other processes use the cores
            np.copyto(room.numpy(), tensor.reshape(-1).view(torch.uint8).numpy())
        else:
            target.copy_(tensor, non_blocking=_is_queued(tensor))
        return target


def _is_queued(tensor: Tensor) -> bool:
    """Whether a copy to page-locked memory is queued on the device, without a wait of the host."""
    return tensor.device.type not in ("cpu", "mps", "meta")


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is contiguous and in host memory."""
    on_host = tensor.device.type == "cpu" and tensor.is_contiguous()
    return on_host and not (tensor.is_conj() or tensor.is_neg())


def _space(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
