"""Norms with manual backward passes, which need half of autograd's memory traffic.

Shapes: B batch, T time, C channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nexus_plugins.model_nexus.operations import blocks_of

__all__ = ["RMSNorm", "gated_rms_norm", "gradient_of_norm", "rms_norm"]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Scale to a mean square of one over the last dimension.

    Args:
        x: `(..., C)`, of at least two dimensions.
        eps: added to the mean square.

    Returns:
        `(..., C)` in the dtype of `x`; computed in float32 or wider.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", without a scale: the
        projection that follows can express the same.
    """
    result: Tensor = _RMSNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return result


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm of `(B, T, C)` with a learned scale, by `rms_norm`: a third of its time."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale `(B, T, C)`."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, eps) * self.weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y: Tensor = (wide * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)  # the projection that follows keeps y as well
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        return gradient_of_norm(grad_y.to(scale.dtype), y.to(scale.dtype), scale), None


def gradient_of_norm(grad: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient of `y = x * scale`, where `scale` gives y a mean square of one, by x.

    Args:
        grad: by y, `(..., C)`.
        y: `(..., C)`.
        scale: `(..., 1)`.
    """
    if y.is_cpu and y.numel() and not torch.compiler.is_compiling():
        return _gradient_in_one_pass(grad, y, scale)
    products = grad * y
    along = products.mean(-1, keepdim=True)
    return torch.addcmul(grad, y, along, value=-1, out=products).mul_(scale)


def _gradient_in_one_pass(grad: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The same by the CPU kernel of `nn.utils.weight_norm`, here for rows of length sqrt(C)."""
    root = y.shape[-1] ** 0.5
    rows, gain = (part.flatten(0, -2).contiguous() for part in (y, scale * root))
    length = torch.full_like(gain, root)
    result, _ = torch.ops.aten._weight_norm_interface_backward(
        grad.flatten(0, -2).contiguous(), rows, gain, length, 0
    )
    return cast(Tensor, result).view_as(grad)


def gated_rms_norm(x: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Scale `x * silu(gate)` to a mean square of one over the last dimension.

    Args:
        x: `(B, T, C)`.
        gate: `(B, T, C)`.
        eps: added to the mean square.

    Returns:
        `(B, T, C)` in the dtype of `x`; computed in float32 or wider.

    Source: as of `rms_norm`.
    """
    result: Tensor = _GatedRMSNorm.apply(x, gate, eps)  # type: ignore[no-untyped-call]
    return result


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(*x.shape[:2], 1, dtype=wide, device=x.device)
        for block in blocks_of(x, 1):
            gated, _ = _gated(x[block].to(wide), gate, block)
            scale[block] = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
            torch.mul(gated, scale[block], out=y[block])
        ctx.save_for_backward(x, gate, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gate, scale = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_gate = torch.empty_like(grad_x)
        for block in blocks_of(x, 1):
            values = x[block].to(scale.dtype)
            gated, opening = _gated(values, gate, block)
            y = gated.mul_(scale[block])
            grad = gradient_of_norm(grad_y[block].to(scale.dtype), y, scale[block])
            grad_gate[block] = torch.ops.aten.silu_backward(
                grad * values, gate[block].to(scale.dtype)
            )
            torch.mul(grad, opening, out=grad_x[block])
        return grad_x, grad_gate, None


def _gated(x: Tensor, gate: Tensor, block: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
    """The gated values of a block, and how far the gate is open."""
    opening = F.silu(gate[block].to(x.dtype))
    return x * opening, opening
