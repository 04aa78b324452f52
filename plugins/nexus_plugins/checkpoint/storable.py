"""What a checkpoint cannot hold, found at the first step and named, with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus_core.bases.parallel import is_sharded, local_part
from nexus_core.errors import CheckpointError
from nexus_plugins.checkpoint.codec import TensorBag, encode
from nexus_plugins.checkpoint.tensorfile import DTYPES, check_header

__all__ = ["check_storable", "plain"]

_PLACES = {"model": "the model's", "optimizer": "the optimizer's"}


def check_storable(parts: Mapping[str, Any]) -> None:
    """See that a state can be written, without writing it.

    Args:
        parts: "model", "optimizer", and "plugins" with the state of each by name.

    Raises:
        CheckpointError: something in it cannot; the message names it and says what to do.
    """
    for part in ("model", "optimizer"):
        bag = TensorBag()
        encode(parts[part], bag, part)
        _check_tensors(
            _PLACES[part], {k.removeprefix(f"{part}."): t for k, t in bag.tensors.items()}
        )
    for name, state in parts["plugins"].items():
        bag = TensorBag()
        encode(state, bag, f"plugins.{name}")
        prefix = f"plugins.{name}."
        tensors = {key.removeprefix(prefix): tensor for key, tensor in bag.tensors.items()}
        _check_tensors(f"plugin {name}'s", tensors)


def plain(tree: Any) -> Any:
    """A tree with numbers of numpy as Python's: learning rates and metrics that were computed."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(plain(value) for value in tree)
    scalar = type(tree).__module__ == "numpy" and getattr(tree, "shape", None) == ()
    return tree.item() if scalar else tree


def _check_tensors(whose: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if advice := _fault(tensor):
            raise CheckpointError(
                f"{whose} tensor '{name}' cannot be stored in a checkpoint: {advice}"
                + (_BUFFER if whose == _PLACES["model"] else "")
            )
    check_header({name: local_part(tensor) for name, tensor in tensors.items()}, {}, whose)


_BUFFER = (
    "; a buffer that can be computed again is left out with register_buffer(..., persistent=False)"
)


def _fault(tensor: Tensor) -> str:
    """Why a tensor cannot be stored and what to keep instead; empty where it can."""
    if tensor.is_quantized:
        return "it is quantized; keep int_repr(), and scale and zero point as numbers"
    if tensor.is_nested:
        return "it is nested; keep its values() and offsets()"
    if tensor.is_sparse:
        return "it is sparse; keep to_dense(), or indices() and values()"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}; keep to_dense()"
    if tensor.is_meta:
        return "it is on the meta device and has no values; give it some first"
    if is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor):
        return f"it is a {type(tensor).__qualname__}, a tensor made of others; keep those"
    return _fault_of_dtype(tensor.dtype)


def _fault_of_dtype(dtype: torch.dtype) -> str:
    if dtype in DTYPES.values():
        return ""
    if dtype.is_complex:
        return f"safetensors has no {dtype}; keep torch.view_as_real(x), its parts as real numbers"
    return f"safetensors has no {dtype}; keep view(torch.uint8), its bytes, or another dtype"
