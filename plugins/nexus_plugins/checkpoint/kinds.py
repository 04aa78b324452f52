"""The kinds of values in a plugin's state, held against those that the plugin itself has now."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nexus_core.errors import CheckpointError

__all__ = ["check_kinds"]

_KINDS: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    ("a number", (int, float)),
    ("text", str),
    ("a tensor", Tensor),
    ("a dict", dict),
    ("a list", (list, tuple)),
)


def check_kinds(saved: object, now: object, where: str) -> None:
    """See that what a plugin would take back is of the kind that it keeps.

    A plugin reads its state with trust: text in the place of a number would end as an error in the
    first step, far from its cause. What is None or is not there now may be anything.

    Args:
        saved: of the checkpoint.
        now: what the plugin's `state_dict` returns before it takes anything back.
        where: the place, for the error.

    Raises:
        CheckpointError: a value is of another kind.
    """
    expected, got = _kind(now), _kind(saved)
    if not expected:
        return
    if got != expected:
        raise CheckpointError(
            f"the state of {where} is {got or str(saved)[:80]}, and {expected} is expected"
        )
    if isinstance(now, Mapping) and isinstance(saved, Mapping):
        for key in now.keys() & saved.keys():
            check_kinds(saved[key], now[key], f"{where}.{key}")


def _kind(value: object) -> str:
    return next((name for name, types in _KINDS if isinstance(value, types)), "")
