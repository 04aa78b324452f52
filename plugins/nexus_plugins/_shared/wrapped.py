"""Temporarily wrap a module's `forward` on the instance, on top of earlier patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["give_back_forward", "wrap_forward"]

Forward = Callable[..., Any]
_KEPT = "_forwards_before"


def wrap_forward(module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
    """Wrap the module's current `forward`: its class's, or a patched one."""
    kept = vars(module).setdefault(_KEPT, [])
    kept.append(vars(module).get("forward"))
    module.forward = wrap(module.forward)


def give_back_forward(module: nn.Module) -> None:
    """Undo the last `wrap_forward`."""
    kept = vars(module)[_KEPT]
    before = kept.pop()
    if not kept:
        del vars(module)[_KEPT]
    if before is None:
        del vars(module)["forward"]
    else:
        module.forward = before
