"""Cumulative sums in a deterministic order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["running_sum"]

ADD_IN_ORDER = ("cpu",)  # devices with a deterministic cumsum of floats


def running_sum(value: Tensor, dim: int) -> Tensor:
    """`value.cumsum(dim)`, in a fixed order if deterministic algorithms are requested.

    PyTorch has no deterministic `cumsum` of floats on CUDA, so there the sums are computed by
    doubling, over 1, 2, 4, ... neighbours. This takes log2(length) times as long, and rounds less.

    Source: Hillis & Steele 1986, "Data parallel algorithms".
    """
    if value.device.type in ADD_IN_ORDER or not torch.are_deterministic_algorithms_enabled():
        return value.cumsum(dim)
    length, reach = value.shape[dim], 1
    while reach < length:
        earlier = value.narrow(dim, 0, length - reach)
        later = value.narrow(dim, reach, length - reach)
        value = torch.cat([value.narrow(dim, 0, reach), later + earlier], dim)
        reach *= 2
    return value
