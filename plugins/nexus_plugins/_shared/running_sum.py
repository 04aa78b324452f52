"""Running sums in an order that is known."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["running_sum"]

ADD_IN_ORDER = ("cpu",)  # devices on which cumsum adds up floats in one order


def running_sum(value: Tensor, dim: int) -> Tensor:
    """`value.cumsum(dim)`, in an order that is always the same where that is asked for.

    On CUDA PyTorch has no deterministic `cumsum` of floats, so the sums are made there by doubling:
    of 1, 2, 4, ... neighbours. It takes log2 of the length times as long, and rounds less.

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
