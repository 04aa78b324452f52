"""Batches of any type: what they hold, their size, and copies of them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "Batch",
    "Keeper",
    "batch_size",
    "copied",
    "digest",
    "fingerprint",
    "fresh",
    "leaves",
    "mapped",
    "own_fingerprint",
    "to_device",
]

Batch: TypeAlias = Any
"""What a loader yields: usually a dict of tensors, but any object that holds tensors works."""

_DIGESTED = 1024  # numbers per tensor
_LOOKS = 16  # batches before a loader is trusted not to overwrite them


class Keeper:
    """Keeps waiting batches safe from loaders that reuse their memory."""

    def __init__(self) -> None:
        self._memory: list[tuple[set[int], Batch]] = []
        self._reuses: bool | None = None  # whether the loader overwrites earlier batches

    def kept(self, batch: Batch) -> Batch:
        """The batch, copied unless its loader is known to allocate each batch anew."""
        if self._reuses is None:
            mine = {t.data_ptr() for t in leaves(batch) if isinstance(t, Tensor) and t.numel()}
            if any(mine & others for others, _ in self._memory):
                self._reuses, self._memory = True, []
            elif len(self._memory) == _LOOKS:
                self._reuses, self._memory = False, []
            else:
                self._memory.append((mine, batch))  # held, so that its memory is not reused
        return batch if self._reuses is False else copied(batch)


def digest(batch: Batch) -> str:
    """A short digest of a batch: types, shapes and first numbers of its leaves."""
    return hashlib.sha256(b"".join(map(_bytes_of, leaves(batch)))).hexdigest()[:16]


def fingerprint(data: object) -> str | None:
    """An identifier of the data: its own `fingerprint`, or a digest of a list of batches."""
    if isinstance(data, list | tuple) and data and own_fingerprint(data) is None:
        return digest([len(data), data[0], data[-1]])
    return own_fingerprint(data)


def own_fingerprint(data: object) -> str | None:
    """The data's `fingerprint` attribute; a method of that name does not count."""
    own = getattr(data, "fingerprint", None)
    return None if own is None or callable(own) else str(own)


def _bytes_of(leaf: object) -> bytes:
    if isinstance(leaf, Tensor) and (leaf.layout is not torch.strided or leaf.is_nested):
        return f"{leaf.dtype}{leaf.layout}".encode()
    if isinstance(leaf, Tensor):
        values = leaf.detach().flatten()[:_DIGESTED].cpu().contiguous()
        return (
            f"{leaf.dtype}{tuple(leaf.shape)}".encode() + values.view(torch.uint8).numpy().tobytes()
        )
    if isinstance(leaf, np.ndarray):
        return f"{leaf.dtype}{leaf.shape}".encode() + leaf.ravel()[:_DIGESTED].tobytes()
    plain = leaf is None or isinstance(leaf, str | bytes | int | float)
    return repr(leaf).encode() if plain else type(leaf).__qualname__.encode()


def leaves(batch: object) -> Iterator[object]:
    """The leaves of a batch, in order."""
    if isinstance(batch, Tensor | str | bytes | np.ndarray) or batch is None:
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from leaves(value)
    elif hasattr(batch, "__dict__") and not isinstance(batch, type):
        yield from leaves(vars(batch))
    else:
        yield batch


def batch_size(batch: Batch) -> tuple[int, int]:
    """The rows and tokens of a batch: of `input_ids`, else the first tensor's length."""
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if isinstance(first, Tensor) and first.ndim:
        return first.shape[0], first.shape[0]  # the common case, without a search
    ids = batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else None
    if isinstance(ids, Tensor | np.ndarray):
        return (len(ids) if ids.ndim > 1 else 1), math.prod(ids.shape)
    if isinstance(ids, list | tuple):
        return len(ids), sum(r.numel() if isinstance(r, Tensor) else np.size(r) for r in ids)
    arrays = (leaf for leaf in leaves(batch) if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim)
    rows = next((len(array) for array in arrays), 1)
    return rows, rows


def fresh(batch: Batch) -> Batch:
    """The batch in new containers with the same tensors, so that plugins may change entries."""
    return mapped(batch, lambda leaf: leaf)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch in new containers, with every tensor on the device."""

    def move(leaf: Batch) -> Batch:
        if isinstance(leaf, Tensor):
            return leaf if leaf.device == device else leaf.to(device, non_blocking=True)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return mapped(batch, move)


def copied(batch: Batch) -> Batch:
    """The batch with copied tensors and arrays."""

    def copied(leaf: Batch) -> Batch:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return mapped(batch, copied)


def mapped(batch: Batch, change: Callable[[Batch], Batch]) -> Batch:
    """The batch in new containers of the same classes, each leaf changed."""
    kind = type(batch)  # the common types first: this runs at every step
    if kind is Tensor:
        return change(batch)
    if kind is dict:
        return {key: mapped(value, change) for key, value in batch.items()}
    if kind is tuple:
        return tuple([mapped(value, change) for value in batch])
    if isinstance(batch, Tensor | PackedSequence):
        return change(batch)
    if isinstance(batch, Mapping):
        values = {key: mapped(value, change) for key, value in batch.items()}
        copies = isinstance(batch, dict) or hasattr(type(batch), "__copy__")
        return _filled(batch, values) if isinstance(batch, MutableMapping) and copies else values
    if isinstance(batch, tuple):
        return tuple.__new__(type(batch), [mapped(value, change) for value in batch])
    if isinstance(batch, list):
        new = copy.copy(batch)
        new[:] = [mapped(value, change) for value in batch]
        return new
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _mapped_fields(batch, change)
    return change(batch)


def _mapped_fields(batch: Batch, change: Callable[[Batch], Batch]) -> Batch:
    new = copy.copy(batch)
    for name in (part.name for part in dataclasses.fields(batch) if hasattr(batch, part.name)):
        object.__setattr__(new, name, mapped(getattr(batch, name), change))
    return new


def _filled(batch: MutableMapping[Any, Any], values: dict[Any, Any]) -> MutableMapping[Any, Any]:
    """A mapping of the same class, with the same attributes and new values."""
    new = copy.copy(batch)
    for key, value in values.items():
        new[key] = value
    return new
