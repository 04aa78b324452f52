"""An accelerator made of host memory, to try plugins and models on where there is no other.

    with host_accelerator() as accelerator:
        model = MyModel().to(accelerator.device)
        ...
    print(*accelerator.waits, sep="\\n")

PyTorch has a device `fakegpu` within the block, with memory, random generators and a module
`torch.fakegpu` of its own. It computes as the host does, and is faithful in what goes wrong on a
GPU and cannot on a CPU:

- Tensors of the host and of the device cannot be mixed, but for numbers (tensors without a
  dimension), indices, and `copy_`.
- Every time that the host waits for the device is noted, with the line that made it wait: `item`,
  `bool` and the like, a copy that is not `non_blocking`, `nonzero`, indexing by a mask, and others
  whose result has a shape that the values decide.
- A `non_blocking` copy to the host arrives when the host waits next; until then its target holds
  garbage. Pinned memory is read late too, and an error says where it was written to meanwhile.
- Memory that nothing has been written to (`torch.empty`) holds garbage.
- Memory is counted, and an allocation beyond a limit is a `torch.OutOfMemoryError`.
- A generator of the host draws nothing for the device, and the device's own state is apart.
- Its work can be captured in a graph and replayed (`torch.fakegpu.CUDAGraph`): capturing computes
  nothing, waiting meanwhile is an error, and so is a generator that was not registered.
- `torch.fakegpu.set_sync_debug_mode` warns of waits, or makes them errors.
- `torch.autocast("fakegpu")`, `GradScaler("fakegpu")` and fused optimizers work.

What it does not show: speed, several streams, several devices, sparse tensors, compiled code, and
numbers that other kernels compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nexus_core.testing.accelerator.device import NAME, Device, registered
from nexus_core.testing.accelerator.waits import Listener, Wait

__all__ = ["HostAccelerator", "Wait", "host_accelerator"]


class HostAccelerator:
    """The accelerator, while it is there and after.

    Attributes:
        device: `fakegpu:0`.
    """

    def __init__(self, device: Device) -> None:
        self.device = torch.device(NAME, 0)
        self._waits = device.waits
        self._memory = device.memory

    @property
    def waits(self) -> list[Wait]:
        """Every wait of the host for the device, oldest first; `clear()` forgets them."""
        return self._waits.seen

    @property
    def limit(self) -> int | None:
        """Bytes beyond which nothing is allocated; None: no limit."""
        return self._memory.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._memory.limit = limit

    @property
    def allocated(self) -> int:
        """Bytes of all tensors that are on the device."""
        return self._memory.allocated

    @contextmanager
    def told(self, listener: Listener) -> Iterator[None]:
        """Call a function with each wait within the block: what for, and the frame that asks."""
        self._waits.listeners.append(listener)
        try:
            yield
        finally:
            self._waits.listeners.remove(listener)


@contextmanager
def host_accelerator(limit: int | None = None) -> Iterator[HostAccelerator]:
    """Give PyTorch an accelerator made of host memory for the length of a `with` block.

    Tensors that are left on it afterwards can be read no more.

    Args:
        limit: bytes beyond which nothing is allocated; None: no limit.

    Raises:
        ConfigError: this PyTorch cannot have it, or there is one already.
    """
    device = registered()
    with device.activated():
        device.memory.limit = limit
        yield HostAccelerator(device)
