"""Copies to and from the accelerator, and operations that resize tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus_core.testing.accelerator.memory import fill_with_garbage

if TYPE_CHECKING:
    from nexus_core.testing.accelerator.device import Device

__all__ = ["Moves", "OnTheHost"]

_aten: Any = torch.ops.aten
_without_modes: Any = torch._C.DisableTorchFunction
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView")  # noqa: B009


class OnTheHost:
    """Runs host operations that autograd and torch modes do not see."""

    def __init__(self) -> None:
        self._guards = (_without_modes(), _below_autograd())

    def __enter__(self) -> None:
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *error: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(*error)


class Moves:
    """Copies, and operations that give a tensor other memory.

    Args:
        device: the device, with its memory and waits.
    """

    def __init__(self, device: Device) -> None:
        self._device = device

    def kernels(self) -> dict[str, Callable[..., Any]]:
        """The implementation of each operation."""
        return {
            "copy_": self.copy_,
            "_to_copy": self.to_copy,
            "resize_": self.resize_,
            "set_.source_Storage_storage_offset": self.set_,
            "as_strided": as_strided,
            "record_stream": _nothing,
        }

    def copy_(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy within the device, to it, or from it."""
        with OnTheHost():
            recording = self._device.recording
            if recording is None:
                self._copy(target, source, non_blocking)
                return target
            recording.keep(self._host(tensor) for tensor in (target, source))
            self._copy(target, source, non_blocking)
            recording.work.append(partial(self._copy, target, source, non_blocking))
            return target

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        waits, pinned = self._device.waits, self._device.pinned
        to = self._host(target)
        value = self._host(source)
        if source.device == target.device or not source.numel():
            to.copy_(value)
        elif target.device.type == "fakegpu":
            self._sent(source, non_blocking)
            to.copy_(value)
        elif non_blocking and target in pinned:
            waits.arrive_late(target, value.to(target.dtype, copy=True).expand_as(target))
        else:
            how = ", as its memory is not pinned" if non_blocking else ""
            waits.wait(f"a copy to the host{how}")
            to.copy_(value)

    def to_copy(
        self,
        source: Tensor,
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> Tensor:
        """`Tensor.to` and `Tensor.cpu`; an asynchronous copy to the host returns pinned memory."""
        with OnTheHost():
            waits, recording = self._device.waits, self._device.recording

            def compute() -> Tensor:
                host = self._host(source)
                made: Tensor = _aten._to_copy(
                    host, dtype=dtype, device="cpu", memory_format=memory_format
                )
                return made

            if recording is not None:
                recording.keep([self._host(source)])
            value = compute()
            if device is None or torch.device(device).type == "fakegpu":
                if source.device.type == "cpu" and source.numel():
                    self._sent(source, non_blocking)
                if recording is not None:
                    recording.note(compute, value)
                return self._device.memory.adopt(value)
            if non_blocking:
                arrived = torch.empty_like(value)
                self._device.pinned.add(arrived)
                waits.arrive_late(arrived, value)
                if recording is not None:
                    recording.work.append(lambda: waits.arrive_late(arrived, compute()))
                return arrived
            waits.wait("a copy to the host")
            return value

    def resize_(
        self, tensor: Tensor, size: Sequence[int], memory_format: torch.memory_format | None = None
    ) -> Tensor:
        """Resize a tensor; if it no longer fits, it moves to new memory."""
        host = self._host(tensor)
        before = host.untyped_storage().nbytes()
        wanted = torch.empty(size, dtype=tensor.dtype, device="meta")
        fits = before >= (tensor.storage_offset() + wanted.numel()) * tensor.element_size()
        if fits:
            _aten.as_strided_(tensor, size, wanted.stride())
            return tensor
        self._device.waits.refuse("growing the memory of an existing tensor")
        grown = fill_with_garbage(torch.empty(size, dtype=tensor.dtype))
        grown.flatten()[: host.numel()] = host.flatten()
        _aten.set_data(tensor, self._device.memory.adopt(grown))
        return tensor

    def set_(
        self,
        tensor: Tensor,
        storage: torch.UntypedStorage,
        offset: int,
        size: Sequence[int],
        stride: Sequence[int] = (),
    ) -> Tensor:
        """Set a tensor to an existing storage of the device."""
        all_of_it = storage.nbytes() // tensor.element_size()
        like = torch.empty(all_of_it, dtype=tensor.dtype, device="meta")
        steps = stride or torch.empty(size, device="meta").stride()
        like = _aten.as_strided_(like, size, steps, offset)
        _aten.set_data(tensor, self._device.memory.over(storage, like))
        return tensor

    def _sent(self, source: Tensor, non_blocking: bool) -> None:
        """Record a copy from host to device; pinned memory is read later."""
        if not non_blocking:
            self._device.waits.wait("a copy to the device (non_blocking=False)")
        elif source in self._device.pinned:
            self._device.waits.leave_late(source)
        else:
            self._device.waits.refuse("a copy to the device of memory that is not pinned")

    def _host(self, tensor: Tensor) -> Tensor:
        ours = tensor.device.type == "fakegpu"
        return self._device.memory.host_view(tensor) if ours else tensor


def as_strided(
    tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    """A strided view of a tensor's memory."""
    start = tensor.storage_offset() if offset is None else offset
    made: Tensor = _aten.as_strided_(_aten.alias(tensor), size, stride, start)
    return made


def _nothing(*_: Any) -> None:
    """Does nothing: there is only one stream."""
