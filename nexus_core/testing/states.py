"""Compare states leaf by leaf, and convert them as a checkpoint does."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from nexus_core.snapshot import Snapshot

__all__ = ["differences", "foreign_leaves", "of_training", "stored"]

PLAIN = (bool, int, float, str)
DICTS = (dict, OrderedDict)
_CLOCKS = ("seconds",)  # counters that differ between any two runs


def differences(one: Any, other: Any, path: str = "", *, types: bool = False) -> list[str]:
    """The bitwise differences of two trees of dicts, lists, tensors and numbers, one line each.

    Args:
        one: a tree.
        other: another tree.
        path: prefix of the paths in the lines.
        types: compare container types too: list and tuple, dict and Counter.
    """
    if types and (kinds := _kind(one)) != (others := _kind(other)):
        return [f"{path}: {kinds} {one!r:.60}, and {others} {other!r:.60}"]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = {**one, **other}
        return [line for key in keys for line in _entry(one, other, key, path, types)]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{path}: {len(one)} entries, and {len(other)}"]
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
        return [line for at, a, b in pairs for line in differences(a, b, at, types=types)]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _of_tensors(one, other, path)
    same = type(one) is type(other) and (one == other or (one != one and other != other))
    return [] if same else [f"{path}: {one!r}, and {other!r}"]


def foreign_leaves(tree: Any, path: str) -> list[str]:
    """The leaves a checkpoint cannot hold: all but tensors, JSON values, tuples and number keys."""
    if type(tree) in DICTS:
        keys = [f"{path}: the key {key!r}" for key in tree if type(key) not in PLAIN]
        below = [foreign_leaves(value, f"{path}.{key}") for key, value in tree.items()]
        return keys + [line for lines in below for line in lines]
    if type(tree) in (list, tuple):
        return [f for i, value in enumerate(tree) for f in foreign_leaves(value, f"{path}[{i}]")]
    if tree is None or type(tree) in PLAIN or isinstance(tree, Tensor):
        return []
    return [f"{path}: {type(tree).__name__} {tree!r:.60}"]


def stored(tree: Any) -> Any:
    """The tree as restored from a checkpoint: tensors are copied, the rest goes through JSON."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: stored(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(stored(value) for value in tree)
    return json.loads(json.dumps(tree))


def of_training(snapshot: Snapshot) -> dict[str, Any]:
    """The parts of a snapshot that are equal in equal runs: all but times and measured speeds."""
    losses = {k: v for k, v in snapshot["metrics"].items() if k.endswith("loss")}
    counters = {k: v for k, v in snapshot["train"].items() if k not in _CLOCKS}
    return {**snapshot, "metrics": losses, "train": counters, "pending": {}}


def _kind(value: object) -> str:
    """The type of a value, not distinguishing subclasses of tensors and kinds of dicts."""
    if isinstance(value, Tensor):
        return "Tensor"
    return "dict" if type(value) in DICTS else type(value).__name__


def _entry(
    one: Mapping[Any, Any], other: Mapping[Any, Any], key: Any, path: str, types: bool
) -> Iterator[str]:
    below = f"{path}.{key}" if path else str(key)
    if key in one and key in other:
        yield from differences(one[key], other[key], below, types=types)
    else:
        yield f"{below}: is only in {'the first' if key in one else 'the second'}"


def _of_tensors(one: Tensor, other: Tensor, path: str) -> list[str]:
    kinds = [(t.dtype, tuple(t.shape)) for t in (one, other)]
    if kinds[0] != kinds[1]:
        return [f"{path}: {kinds[0]}, and {kinds[1]}"]
    one, other = one.detach().cpu(), other.detach().cpu()
    equal = (one == other) | ((one != one) & (other != other))
    if bool(equal.all()):
        return []
    apart = (one.double() - other.double()).abs().max().item()
    return [f"{path}: {int((~equal).sum())} of {one.numel()} numbers differ, by up to {apart:.3g}"]
