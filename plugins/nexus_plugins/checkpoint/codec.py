"""Encode trees of Python values as JSON and a flat dict of tensors, and decode them.

JSON cannot represent everything in a state. The rest is an object with one key:

    {"$tensor": "state.0.exp_avg"}     a tensor, under its key in the safetensors file
    {"$float": "nan"}                  a non-finite float ("inf", "-inf")
    {"$int": "0x10000000000000000"}    an int beyond 64 bits
    {"$tuple": [0.9, 0.95]}            a tuple
    {"$bytes": "7b7d"}                 bytes, in hexadecimal
    {"$dict": [[0, ...], [1, ...]]}    a dict whose keys are not plain strings
    {"$ordered": [["a", ...], ...]}    an OrderedDict, such as a module's state_dict

Tensors that share memory (tied weights) are stored once, under their first name, and are restored
as one tensor.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import cast

from torch import Tensor

from nexus_core.errors import CheckpointError
from nexus_core.processes import local_part
from nexus_plugins._shared.checkpoints.folder import Json
from nexus_plugins._shared.checkpoints.tensorfile import fault_of

__all__ = ["TensorBag", "decode", "encode"]

_DEPTH = 100
_INT64 = 1 << 63
_HEX = re.compile("(?:[0-9a-f]{2})*")
_RESERVED = "__metadata__"  # a safetensors header's own key


class TensorBag:
    """Collects the tensors of a tree under unique names, each storage once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        """Names that are not stored because their memory is stored under another name."""
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


def encode(value: object, bag: TensorBag, path: str = "", depth: int = 0) -> Json:
    """Encode a tree as JSON; its tensors go into the bag.

    Args:
        value: dicts, lists, tuples, tensors, strings, bytes, numbers, booleans and None, but no
            subclasses, which would be restored as the base type.
        bag: collects the tensors.
        path: the path of the tree, for tensor names and error messages.
        depth: depth of that path.

    Raises:
        CheckpointError: the tree contains an unsupported type, or is recursive.
    """
    if depth > _DEPTH:
        raise CheckpointError(
            f"the state '{path[:80]}...' is nested more than {_DEPTH} levels deep, or contains "
            "itself; a checkpoint cannot hold it"
        )
    kind = type(value)
    if value is None or kind in (bool, str):
        return value  # type: ignore[return-value]
    if kind is int:
        number = cast(int, value)
        return number if -_INT64 <= number < _INT64 else {"$int": hex(number)}
    if kind is float:
        real = cast(float, value)
        return real if math.isfinite(real) else {"$float": str(real)}
    if kind is bytes:
        return {"$bytes": cast(bytes, value).hex()}
    if isinstance(value, Tensor):
        if fault := fault_of(value):
            raise CheckpointError(f"the tensor '{path}' cannot be stored in a checkpoint: {fault}")
        return {"$tensor": bag.add(path, value)}
    if kind is dict or kind is OrderedDict:
        return _encode_dict(cast(dict[object, object], value), bag, path, depth)
    if kind is list or kind is tuple:
        row = cast(Sequence[object], value)
        items = [encode(item, bag, _join(path, i), depth + 1) for i, item in enumerate(row)]
        return items if kind is list else {"$tuple": items}
    raise CheckpointError(
        f"the state '{path}' is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot "
        f"hold; {_advice(value)}"
    )


def _advice(value: object) -> str:
    """What to keep instead of a value that cannot be stored."""
    if isinstance(value, Enum):
        return "keep its .value, or its .name"
    if type(value).__module__ == "numpy":
        scalar = getattr(value, "shape", None) == ()
        return "keep .item(), a number" if scalar else "keep torch.from_numpy(...) or .tolist()"
    for kind in (dict, tuple, list, str, int, float):
        if isinstance(value, kind):
            return f"it would come back as a {kind.__name__}; keep {kind.__name__}(...)"
    if isinstance(value, set | frozenset | deque | range):
        return "keep a list of its items"
    return (
        "states may contain dicts, lists, tuples, strings, bytes, numbers, booleans, None, tensors"
    )


def decode(value: Json, tensors: Mapping[str, Tensor]) -> object:
    """Decode what `encode` wrote.

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


def _encode_dict(value: dict[object, object], bag: TensorBag, path: str, depth: int) -> Json:
    ordered = type(value) is OrderedDict
    if not ordered and all(type(key) is str and not key.startswith("$") for key in value):
        return {
            str(key): encode(item, bag, _join(path, key), depth + 1) for key, item in value.items()
        }
    for key in value:
        if key is not None and type(key) not in (str, int, float, bool):
            raise CheckpointError(
                f"the dict at '{path}' has the key {key!r:.80}, of type {type(key).__qualname__}; "
                "checkpoint keys must be strings, numbers, booleans or None"
            )
    items: list[Json] = [
        [encode(key, bag, path), encode(item, bag, _join(path, key), depth + 1)]
        for key, item in value.items()
    ]
    return {"$ordered" if ordered else "$dict": items}


def _decode_marked(mark: str, content: Json, tensors: Mapping[str, Tensor]) -> object:
    if mark == "$tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if mark == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if mark == "$int" and isinstance(content, str):
        return _big_int(content)
    if mark == "$bytes" and isinstance(content, str) and _HEX.fullmatch(content):
        return bytes.fromhex(content)
    if mark == "$tuple" and isinstance(content, list):
        return tuple(decode(item, tensors) for item in content)
    if mark == "$dict" and isinstance(content, list):
        return dict(_decode_item(item, tensors) for item in content)
    if mark == "$ordered" and isinstance(content, list):
        return OrderedDict(_decode_item(item, tensors) for item in content)
    raise CheckpointError(f"state.json holds {mark}: {str(content)[:80]!r}, which is invalid")


def _decode_item(item: Json, tensors: Mapping[str, Tensor]) -> tuple[object, object]:
    if isinstance(item, list) and len(item) == 2:
        key = decode(item[0], tensors)
        if key is None or isinstance(key, str | int | float):
            return key, decode(item[1], tensors)
    raise CheckpointError(f"state.json holds {str(item)[:80]!r} instead of a key and a value")


def _big_int(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError as error:
        raise CheckpointError(f"state.json holds the integer {text[:80]!r}") from error


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
