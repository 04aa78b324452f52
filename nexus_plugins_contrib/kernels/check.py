"""Compare a kernel with the operation that it replaces, computed in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nexus_plugins_contrib.kernels.swaps import Operation

__all__ = ["largest_difference"]


def largest_difference(
    kernel: Operation, own: Operation, arguments: Sequence[Any], weights: Sequence[nn.Parameter]
) -> tuple[float, str]:
    """The error of a kernel against float32, in result and gradients; syncs with the device.

    Args:
        kernel: the operation to check.
        own: the operation that it replaces.
        arguments: the arguments of the call.
        weights: what the operation reads in addition to its arguments.

    Returns:
        The largest relative difference (by norm), and where it occurs.
    """
    found = _result_and_gradients(kernel, arguments, weights)
    wide = [a.float() if _is_real(a) else a for a in arguments]
    with torch.autocast(_device(arguments), enabled=False):
        expected = _result_and_gradients(own, wide, weights)
    distances = {name: _distance(found[name], value) for name, value in expected.items()}
    worst = max(distances, key=lambda name: distances[name])
    return distances[worst], worst


def _result_and_gradients(
    operation: Operation, arguments: Sequence[Any], weights: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        given = [a.detach().requires_grad_() if _is_real(a) else a for a in arguments]
        result = operation(*given)
        sources = [a for a in given if _is_real(a)] + [w for w in weights if w.requires_grad]
        direction = torch.arange(1.0, result.numel() + 1, device=result.device).sin()
        gradients = torch.autograd.grad(
            result, sources, direction.view(result.shape).to(result.dtype), allow_unused=True
        )
    named = {f"gradient {n}": g for n, g in enumerate(gradients, 1) if g is not None}
    return {"the result": result.detach(), **named}


def _distance(found: Tensor, expected: Tensor) -> float:
    """The relative distance; infinite if a number is not finite."""
    expected = expected.double()
    distance = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    return distance if math.isfinite(distance) else math.inf


def _device(arguments: Sequence[Any]) -> str:
    return next(a.device.type for a in arguments if isinstance(a, Tensor))


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
