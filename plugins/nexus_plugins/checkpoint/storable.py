"""Find what a checkpoint cannot hold, at the first step, with advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nexus_core.errors import CheckpointError
from nexus_core.processes import local_part
from nexus_plugins._shared.checkpoints.tensorfile import check_header, fault_of
from nexus_plugins.checkpoint.codec import TensorBag, encode

__all__ = ["check_storable", "plain"]


def check_storable(parts: Mapping[str, Any]) -> None:
    """Check that a state can be written, without writing it.

    Args:
        parts: "model", "optimizer", and "plugins" with the state of each by name.

    Raises:
        CheckpointError: something in it cannot be stored; the message names it and says what to do.
    """
    for name, tensor in parts["model"].items():
        if isinstance(tensor, Tensor) and (fault := fault_of(tensor)):
            raise CheckpointError(
                f"the model's tensor '{name}' cannot be stored in a checkpoint: {fault}; a buffer "
                "that can be recomputed is excluded with register_buffer(..., persistent=False)"
            )
    for part, whose in (("model", "the model's"), ("optimizer", "the optimizer's")):
        _check(parts[part], part, whose)
    _check(parts["plugins"], "plugins", "the plugins'")


def _check(tree: object, path: str, whose: str) -> None:
    bag = TensorBag()
    encode(tree, bag, path)
    check_header({name: local_part(t) for name, t in bag.tensors.items()}, bag.aliases, whose)


def plain(tree: Any) -> Any:
    """Convert NumPy scalars in a tree, such as computed rates and metrics, to Python's."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(plain(value) for value in tree)
    scalar = type(tree).__module__ == "numpy" and getattr(tree, "shape", None) == ()
    return tree.item() if scalar else tree
