"""The memory of the accelerator: tensors with their own device type, backed by host memory."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Memory", "fill_with_garbage"]

_EXTENSION_DEVICE = 12  # in DLPack; PyTorch reads it as PrivateUse1
_DEVICE_TYPE_AT = 8  # offset in a DLTensor, after the data pointer

_pointer_of: Any = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Place(NamedTuple):
    """The host storage behind a device storage, and its address."""

    storage: weakref.ref[torch.UntypedStorage]
    start: int


class Memory:
    """Keeps track of the tensors on the accelerator, their size and its limit.

    A device tensor is a host tensor passed through DLPack with another device type: both share the
    same memory, but PyTorch sees no connection between them.

    Attributes:
        limit: memory limit in bytes; None: no limit.
        share: fraction of the limit (or of a terabyte) that this process may use.
        allocated: bytes of all tensors on the device.
        peak: maximum of `allocated`.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.share = 1.0
        self.allocated = 0
        self.peak = 0
        self._places: dict[int, _Place] = {}

    @property
    def total(self) -> int:
        """The device's memory in bytes."""
        return 1 << 40 if self.limit is None else self.limit

    def adopt(self, host: Tensor) -> Tensor:
        """Turn a host tensor, which nobody else uses, into a device tensor in the same memory.

        Raises:
            torch.OutOfMemoryError: it exceeds the limit.
        """
        storage = host.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if start and start not in self._places:
            self._make_room(size)
            forget = self._forgetting(start, size)
            self._places[start] = _Place(weakref.ref(storage, forget), start)
        tensor = _on_device(host)
        first = tensor.untyped_storage().data_ptr()
        if first not in self._places and start:
            weakref.finalize(storage, self._places.pop, first, None)
            self._places[first] = _Place(self._places[start].storage, start)
        return tensor

    def alias(self, tensors: Iterable[Tensor], host: Tensor) -> Tensor:
        """The device tensor for a host tensor: a view of one of `tensors` if they share memory.

        Args:
            tensors: device tensors.
            host: host tensor, possibly in the memory of one of them.
        """
        start = host.untyped_storage().data_ptr() + host.storage_offset() * host.element_size()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            offset = start - storage.data_ptr()
            fits = offset >= 0 and offset + _reach(host) <= storage.nbytes()
            if fits and tensor.dtype == host.dtype:
                alias: Tensor = torch.ops.aten.alias(tensor)
                offset //= host.element_size()
                torch.ops.aten.as_strided_(alias, host.shape, host.stride(), offset)
                return alias
        return self.adopt(host)

    def host_view(self, tensor: Tensor) -> Tensor:
        """A host tensor with the same memory as a device tensor, and the same lazy sign."""
        view = self._over(tensor.untyped_storage(), tensor)
        view = torch._conj(view) if tensor.is_conj() else view
        return torch._neg_view(view) if tensor.is_neg() else view

    def over(self, storage: torch.UntypedStorage, like: Tensor) -> Tensor:
        """A device tensor over a device storage, with the layout of a meta tensor."""
        return self.adopt(self._over(storage, like))

    def _over(self, storage: torch.UntypedStorage, like: Tensor) -> Tensor:
        first = storage.data_ptr()
        if not first:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        place = self._places[first]
        known = place.storage()
        assert known is not None
        offset = like.storage_offset() + (first - place.start) // like.element_size()
        return torch.empty(0, dtype=like.dtype).set_(known, offset, like.shape, like.stride())

    def _make_room(self, size: int) -> None:
        if self.allocated + size > (most := int(self.total * self.share)):
            raise torch.OutOfMemoryError(
                f"fakegpu out of memory. Tried to allocate {size} bytes; {self.allocated} of "
                f"{most} bytes are allocated."
            )
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def _forgetting(self, place: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._places.pop(place, None)
            self.allocated -= size

        return forget


def _reach(host: Tensor) -> int:
    """The number of bytes that a tensor spans."""
    if not host.numel():
        return 0
    steps = sum((size - 1) * step for size, step in zip(host.shape, host.stride(), strict=True))
    return int((steps + 1) * host.element_size())


def fill_with_garbage(host: Tensor) -> Tensor:
    """Fill uninitialized memory with values that cannot be mistaken for a result."""
    if host.dtype.is_floating_point or host.dtype.is_complex:
        return host.fill_(float("nan"))
    return host.fill_(True) if host.dtype == torch.bool else host.fill_(torch.iinfo(host.dtype).max)


def _on_device(host: Tensor) -> Tensor:
    capsule = torch._C._to_dlpack(host)
    place = _pointer_of(capsule, b"dltensor") + _DEVICE_TYPE_AT
    ctypes.c_int64.from_address(place).value = _EXTENSION_DEVICE  # also sets the device index to 0
    tensor: Tensor = torch._C._from_dlpack(capsule)
    return tensor
