"""Compare the value types in a saved plugin state with those of a fresh plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias, Union

from torch import Tensor

from nexus_core.errors import CheckpointError

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Kinds", "check_kinds", "kinds_of"]

Kinds: TypeAlias = Union[str, "dict[object, Kinds]"]
"""The expected types, by key; an empty string allows anything."""

_DEPTH = 16
_BITS = 1023  # bits that fit every float
_KINDS: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    ("a number", (int, float)),
    ("text", str),
    ("a tensor", Tensor),
    ("a dict", dict),
    ("a list", (list, tuple)),
)


def kinds_of(engine: Engine) -> dict[str, Kinds]:
    """The value types in each plugin's state; call it before anything is trained or restored.

    Values that are None or missing at that time may have any type later.
    """
    return {name: _kinds(plugin.state_dict()) for name, plugin in engine.plugins.items()}


def check_kinds(saved: object, expected: Kinds, where: str) -> None:
    """Check that a saved plugin state has the types that the plugin expects.

    Plugins trust their state: text instead of a number would only fail in the first step, far from
    the cause.

    Args:
        saved: the saved state.
        expected: the types from `kinds_of`.
        where: the path, for the error message.

    Raises:
        CheckpointError: a value has another type, or is a number too large for a float.
    """
    if expected == "":
        return
    got, wanted = _kind(saved), "a dict" if isinstance(expected, dict) else expected
    if got != wanted:
        raise CheckpointError(
            f"the state of {where} is {got or str(saved)[:80]}; expected {wanted}"
        )
    if isinstance(saved, int) and saved.bit_length() > _BITS:
        raise CheckpointError(f"the state of {where} is a number of {saved.bit_length()} bits")
    if isinstance(expected, dict) and isinstance(saved, Mapping):
        for key in expected.keys() & saved.keys():
            check_kinds(saved[key], expected[key], f"{where}.{key}")


def _kinds(value: object, depth: int = 0) -> Kinds:
    if isinstance(value, dict):
        return {k: _kinds(v, depth + 1) for k, v in value.items()} if depth < _DEPTH else ""
    return _kind(value)


def _kind(value: object) -> str:
    return next((name for name, types in _KINDS if isinstance(value, types)), "")
