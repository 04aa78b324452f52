"""An accelerator simulated in host memory, for testing plugins and models without a GPU.

    with host_accelerator() as accelerator:
        model = MyModel().to(accelerator.device)
        ...
    print(*accelerator.waits, sep="\\n")

Within the block PyTorch has a device `fakegpu`, with its own memory and random generators, and a
module `torch.fakegpu`. It computes on the CPU, and reproduces what goes wrong on a GPU only:

- Tensors of the host and of the device cannot be mixed, except numbers (tensors without a
  dimension), indices, and `copy_`.
- Every synchronization is recorded, with the line that caused it: `item`, `bool` and the like, a
  copy that is not `non_blocking`, `nonzero`, indexing by a mask, and other operations whose output
  shape depends on values.
- A `non_blocking` copy to the host completes at the next synchronization; until then its target
  holds garbage. Pinned memory is read late too, and writing to it in the meantime is an error that
  names the line.
- Uninitialized memory (`torch.empty`) holds garbage.
- Memory is counted, and an allocation beyond the limit raises `torch.OutOfMemoryError`.
- Host generators cannot be used for the device, whose generator has its own state.
- Work can be captured in a graph and replayed (`torch.fakegpu.CUDAGraph`): capturing computes
  nothing, and synchronizing or using an unregistered generator meanwhile is an error.
- `torch.fakegpu.set_sync_debug_mode` warns of synchronizations, or makes them errors.
- `torch.autocast("fakegpu")`, `GradScaler("fakegpu")` and fused optimizers work.

It does not reproduce speed, several streams or devices, sparse tensors, compiled code, and the
numerics of other kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nexus_core.testing.accelerator.device import NAME, Device, registered
from nexus_core.testing.accelerator.waits import Listener, Wait

__all__ = ["HostAccelerator", "Wait", "host_accelerator"]


class HostAccelerator:
    """The simulated accelerator; it can be inspected after the block too.

    Attributes:
        device: `fakegpu:0`.
    """

    def __init__(self, device: Device) -> None:
        self.device = torch.device(NAME, 0)
        self._waits = device.waits
        self._memory = device.memory

    @property
    def waits(self) -> list[Wait]:
        """Every wait of the host for the device, oldest first; call `clear()` to reset."""
        return self._waits.seen

    @property
    def limit(self) -> int | None:
        """Memory limit in bytes; None: no limit."""
        return self._memory.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._memory.limit = limit

    @property
    def allocated(self) -> int:
        """Bytes of all tensors on the device."""
        return self._memory.allocated

    @contextmanager
    def told(self, listener: Listener) -> Iterator[None]:
        """Call a function with each wait in the block: its cause, and the frame that causes it."""
        self._waits.listeners.append(listener)
        try:
            yield
        finally:
            self._waits.listeners.remove(listener)


@contextmanager
def host_accelerator(limit: int | None = None) -> Iterator[HostAccelerator]:
    """Give PyTorch an accelerator simulated in host memory for a `with` block.

    Tensors left on it cannot be read after the block.

    Args:
        limit: memory limit in bytes; None: no limit.

    Raises:
        ConfigError: this PyTorch version does not support it, or one is active already.
    """
    device = registered()
    with device.activated():
        device.memory.limit = limit
        yield HostAccelerator(device)
