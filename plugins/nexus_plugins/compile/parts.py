"""What an object is made of, as bytes that can be compared."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

__all__ = ["PLAIN", "Reference", "attributes", "fact", "is_dense", "written"]

Reference: TypeAlias = Callable[[Any], object]
"""What stands for an object; None if it is written out with all its parts."""

PLAIN = frozenset(
    {int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size}
)
"""Types whose values have no parts and do not change."""
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
USUAL = (object.__reduce__, object.__reduce_ex__)
LARGEST = 2**16
"""Bytes of an object that are compared in each step."""


def fact(value: object) -> tuple[object, ...]:
    """A plain value such that it equals itself only: 1, 1.0 and True differ, and nan is nan."""
    return type(value), repr(value) if isinstance(value, float | complex) else value


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor with memory of its own, in strides."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def attributes(value: object) -> dict[str, Any]:
    """The attributes that an object has of its own, in `__dict__` and in slots."""
    state: Any = object.__getstate__(value)
    own, slots = state if isinstance(state, tuple) else (state, None)
    return {**(own or {}), **(slots or {})}


def written(value: object, reference: Reference) -> bytes:
    """An object with all its parts, as bytes: it is pickled, which is fast, and never read again.

    Raises:
        Exception: it cannot be compared; any pickling error, or it is too large.
    """
    into = _Bounded()
    _Writer(into, reference).dump(value)
    return b"".join(into.pieces)


class _Bounded:
    """A file that does not become large."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self._size = 0

    def write(self, piece: Any) -> None:
        self._size += memoryview(piece).nbytes
        if self._size > LARGEST:
            raise ValueError("it is too large")
        self.pieces.append(bytes(piece))


class _Writer(pickle.Pickler):
    """Pickles everything by its parts, functions and objects with a pickle of their own too."""

    def __init__(self, into: _Bounded, reference: Reference) -> None:
        super().__init__(into, protocol=5)
        self._reference = reference

    def persistent_id(self, obj: Any) -> object:
        is_plain = type(obj) in PLAIN or type(obj) in CONTAINERS
        return None if is_plain else self._reference(obj)

    def reducer_override(self, obj: Any) -> Any:
        kind: Any = type(obj)
        if isinstance(obj, FunctionType):
            variables = obj.__defaults__, obj.__kwdefaults__, obj.__closure__, vars(obj)
            return object, (id(obj.__code__),), variables
        if isinstance(obj, CellType):
            return object, (), obj.cell_contents
        is_usual = (kind.__reduce__, kind.__reduce_ex__) == USUAL
        if kind.__getstate__ is object.__getstate__ or not is_usual:
            return NotImplemented
        if isinstance(obj, CONTAINERS):
            raise TypeError(f"a {kind.__name__} has a pickle of its own")
        return object, (kind,), object.__getstate__(obj)  # its own may leave something out
