"""Trees of Python values as JSON and a flat dict of tensors, and back to the same values.

JSON cannot say everything that a state holds. What it cannot is an object with one key:

    {"$tensor": "state.0.exp_avg"}     a tensor, under its key in the safetensors file
    {"$float": "nan"}                  a float that is not finite ("inf", "-inf")
    {"$int": "0x10000000000000000"}    an int beyond 64 bits
    {"$tuple": [0.9, 0.95]}            a tuple
    {"$dict": [[0, ...], [1, ...]]}    a dict whose keys are not plain strings

Tensors that are one and the same memory (tied weights) are stored once, under their first name,
and come back as one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias, Union

from torch import Tensor

from nexus_core.errors import CheckpointError
from nexus_core.processes import local_part

__all__ = ["Json", "TensorBag", "decode", "encode"]

Json: TypeAlias = Union[bool, int, float, str, "list[Json]", "dict[str, Json]", None]
"""What JSON holds."""

_INT64 = 1 << 63
_RESERVED = "__metadata__"  # a safetensors header's own key


class TensorBag:
    """Collects the tensors of a tree under unique names, each piece of memory once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        """Names that were not stored because their memory is, under another name."""
        self._seen: dict[tuple[object, ...], str] = {}

    def add(self, path: str, tensor: Tensor) -> str:
        """Store a tensor under a name made of its path; returns the name."""
        own = local_part(tensor)
        memory = (
            own.device, own.data_ptr(), own.dtype, own.shape, own.stride(), own.is_conj(),
            own.is_neg(),
        )  # fmt: skip
        if own.numel() and memory in self._seen:
            self.aliases[path] = self._seen[memory]
            return self._seen[memory]
        key = path
        while key in self.tensors or key == _RESERVED:
            key += "~"
        self.tensors[key] = tensor.detach()
        self._seen[memory] = key
        return key


def encode(value: object, bag: TensorBag, path: str = "") -> Json:
    """Turn a tree into JSON; its tensors go into the bag.

    Args:
        value: dicts, lists, tuples, tensors, strings, numbers, booleans and None.
        bag: takes the tensors.
        path: the tree's own place, for the names of the tensors and for errors.

    Raises:
        CheckpointError: something in the tree is of another type.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Tensor):
        return {"$tensor": bag.add(path, value)}
    if isinstance(value, dict):
        return _encode_dict(value, bag, path)
    if isinstance(value, list):
        return [encode(item, bag, _join(path, index)) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item, bag, _join(path, i)) for i, item in enumerate(value)]}
    raise CheckpointError(
        f"the state '{path}' is a {type(value).__module__}.{type(value).__qualname__}, which a "
        "checkpoint cannot hold; states are made of dicts, lists, tuples, strings, numbers, "
        "booleans, None and tensors (for numpy, use .tolist() or torch.from_numpy)"
    )


def decode(value: Json, tensors: Mapping[str, Tensor]) -> object:
    """Turn what `encode` wrote back into the tree.

    Raises:
        CheckpointError: it was not written by `encode`, or a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (mark, content), *_ = value.items()
        if mark.startswith("$"):
            return _decode_marked(mark, content, tensors)
    return {key: decode(item, tensors) for key, item in value.items()}


def _encode_dict(value: dict[object, object], bag: TensorBag, path: str) -> Json:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {str(key): encode(item, bag, _join(path, key)) for key, item in value.items()}
    if not all(key is None or isinstance(key, str | int | float) for key in value):
        raise CheckpointError(
            f"the dict at '{path}' has a key that is neither a string nor a number; a checkpoint "
            "cannot hold it"
        )
    return {
        "$dict": [
            [encode(key, bag, path), encode(item, bag, _join(path, key))]
            for key, item in value.items()
        ]
    }


def _decode_marked(mark: str, content: Json, tensors: Mapping[str, Tensor]) -> object:
    if mark == "$tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if mark == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if mark == "$int" and isinstance(content, str):
        return _big_int(content)
    if mark == "$tuple" and isinstance(content, list):
        return tuple(decode(item, tensors) for item in content)
    if mark == "$dict" and isinstance(content, list):
        return dict(_decode_item(item, tensors) for item in content)
    raise CheckpointError(f"state.json holds {mark}: {str(content)[:80]!r}, which means nothing")


def _decode_item(item: Json, tensors: Mapping[str, Tensor]) -> tuple[object, object]:
    if isinstance(item, list) and len(item) == 2:
        key = decode(item[0], tensors)
        if key is None or isinstance(key, str | int | float):
            return key, decode(item[1], tensors)
    raise CheckpointError(f"state.json holds {str(item)[:80]!r} where a key and a value belong")


def _big_int(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError as error:
        raise CheckpointError(f"state.json holds the integer {text[:80]!r}") from error


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
