"""Validate untrusted random generator states before use."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_core.errors import CheckpointError

__all__ = ["check_generators"]

_WORDS = 624
"""Words of the Mersenne Twister, the generator of Python, NumPy and torch on the CPU."""
_TORCH_BYTES = 5056


def check_generators(saved: Mapping[str, Any]) -> None:
    """Load the states of Python, NumPy, torch and its devices into unused generators.

    Checks what the libraries do not: a position beyond the words of a generator would read other
    memory.

    Raises:
        CheckpointError: a state is invalid.
    """
    try:
        version, words, gauss = saved["python"]
        random.Random().setstate((version, tuple(words), gauss))
        _require(gauss is None or type(gauss) is float)
        name, keys, position, has_gauss, cached = saved["numpy"]
        _require(type(position) is int and 0 <= position <= _WORDS and type(has_gauss) is int)
        key_array = np.array(keys, dtype=np.uint32)
        _require(key_array.shape == (_WORDS,))
        np.random.RandomState().set_state((name, key_array, position, has_gauss, cached))
        torch.Generator().set_state(saved["torch"].clone())
        _check_place(saved["torch"])
        _check_devices(saved["devices"])
    except (
        ValueError, TypeError, RuntimeError, OverflowError, AttributeError, LookupError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"invalid states of the random generators: {said}") from error


def _check_place(state: Tensor) -> None:
    """Check that the position of torch's generator is within its words."""
    if state.numel() == _TORCH_BYTES:
        raw = state.contiguous().numpy()
        left, following = int(raw[8:12].view(np.int32)[0]), int(raw[16:24].view(np.uint64)[0])
        _require(1 <= left <= _WORDS and left + following <= _WORDS + 1)


def _check_devices(states: object) -> None:
    _require(isinstance(states, list) and all(isinstance(state, Tensor) for state in states))
    if torch.cuda.is_available() and isinstance(states, list):
        _require(len(states) <= torch.cuda.device_count())
        for state in states:
            torch.Generator("cuda").set_state(state.clone())


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("a number is out of range or has the wrong type")
