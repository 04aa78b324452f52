"""Keep an optimizer unchanged for a skipped step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from nexus_core import Step

__all__ = ["flagged", "unmoved"]


@contextmanager
def unmoved(optimizer: Optimizer) -> Iterator[None]:
    """Undo what an optimizer counts in its groups even though a skipped step has no gradient."""
    groups = [dict(group) for group in optimizer.param_groups]
    yield
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(before)


@contextmanager
def flagged(optimizer: Any, step: Step) -> Iterator[None]:
    """Set an optimizer's `found_inf` as it steps, in addition to what a scaler found."""

    def flag(optimizer: Any, *_: object) -> None:
        refused = cast(Tensor, step.refused)
        found = getattr(optimizer, "found_inf", refused)
        optimizer.found_inf = torch.maximum(refused, found.to(refused.device))

    handle = optimizer.register_step_pre_hook(flag)
    try:
        yield
    finally:
        handle.remove()
        if hasattr(optimizer, "found_inf"):  # a gradient scaler cleans up after itself
            del optimizer.found_inf
