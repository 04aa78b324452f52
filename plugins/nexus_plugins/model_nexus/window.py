"""Attention over the last few tokens, with cost linear in length and a cache of constant size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nexus_plugins.model_nexus.operations import pad_time

__all__ = ["WindowAttention", "WindowState"]

ROTARY_BASE = 10_000.0


class WindowState(NamedTuple):
    """The last tokens' keys and values: constant in size."""

    keys: Tensor
    """(B, W - 1, H, P), oldest first."""
    values: Tensor
    """(B, W - 1, H, P)"""
    filled: Tensor
    """(B, W - 1): whether there is a token."""


class WindowAttention(nn.Module):
    """Each token attends to the last `window` tokens, including itself.

    Shapes: B batch, T time, D model, H = D / head_dim heads of P, W window.

    Args:
        d_model: width D of input and output.
        head_dim: maximum width P of a head: the largest even divisor of D is used.
        window: tokens W that each token sees.

    Source: Beltagy et al. 2020, "Longformer" (windows), in blocks of W that see the block before
        them; Su et al. 2021, "RoFormer" (rotary positions), relative to the window; queries and
        keys are normalized as in Henry et al. 2020, "Query-Key Normalization", by RMS.
    """

    def __init__(self, d_model: int, head_dim: int = 64, window: int = 128) -> None:
        super().__init__()
        self.window = window
        self.head_dim = next(n for n in range(head_dim, 1, -1) if n % 2 == 0 and d_model % n == 0)
        self.heads = d_model // self.head_dim
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, document: Tensor | None = None) -> Tensor:
        """Mix whole sequences `(B, T, D)`; `document` as in `SelectiveSSM.forward`."""
        batch, length = x.shape[:2]
        block = min(self.window, length)
        pairs, value = self._project(x)
        query, key = _rotated(pairs, 0).to(value.dtype).unbind(2)
        query, key, value = (
            torch.unflatten(pad_time(part, -length % block), 1, (-1, block))
            for part in (query, key, value)
        )
        mask = _mask(x, block, document)
        if query.shape[1] > 1:
            key, value = _with_block_before(key), _with_block_before(value)
        y = _attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask)
        y = torch.unflatten(y, 0, (batch, -1)).flatten(1, 2)[:, :length]
        result: Tensor = self.out_proj(y.flatten(-2))
        return result

    def step(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """Read one token `(B, D)`; equal to `forward` up to rounding."""
        pairs, value = self._project(x.unsqueeze(1))
        keys = torch.cat([state.keys, pairs[:, :, 1]], 1)
        values = torch.cat([state.values, value], 1)
        filled = F.pad(state.filled, (0, 1), value=True)
        query = _rotated(pairs[:, :, 0], self.window - 1).to(value.dtype)
        y = _attend(query, _rotated(keys, 0).to(value.dtype), values, filled[:, None, None])
        output: Tensor = self.out_proj(y.flatten(1))
        return output, WindowState(keys[:, 1:], values[:, 1:], filled[:, 1:])

    def initial_state(self, batch: int) -> WindowState:
        """The state before the first token, for `batch` sequences."""
        past = batch, self.window - 1
        empty = self.in_proj.weight.new_zeros(*past, self.heads, self.head_dim)
        filled = torch.zeros(past, dtype=torch.bool, device=empty.device)
        return WindowState(empty, empty, filled)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, 2, H, P) in float32, of unit mean square; values (B, T, H, P)."""
        parts = torch.unflatten(self.in_proj(x), -1, (3, self.heads, self.head_dim))
        return _unit(parts[:, :, :2]), parts[:, :, 2]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, Q, H, P) to (B, L, H, P)."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
    return y.transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    """Scale the last dimension to a mean square of one."""
    result: Tensor = _Unit.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Unit(Function):
    """Normalization with a manual backward pass, in a third of autograd's memory traffic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = x.shape[-1] ** 0.5 / length.clamp_min(1e-6)
        y: Tensor = wide * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y: Tensor
        scale: Tensor
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


def _mask(x: Tensor, block: int, document: Tensor | None) -> Tensor | None:
    """(B * K, 1, Q, L): what each position of a block sees; None: everything up to itself."""
    length, device = x.shape[1], x.device
    blocks = -(-length // block)
    if blocks == 1 and document is None:
        return None
    if document is None:
        document = torch.zeros(x.shape[:2], dtype=torch.long, device=device)
    here = torch.unflatten(pad_time(document, blocks * block - length), 1, (-1, block))
    there = here if blocks == 1 else _with_block_before(here, -1)
    distance = torch.arange(block, device=device).unsqueeze(-1) - torch.arange(
        block - there.shape[2], block, device=device
    )
    near = (distance >= 0) & (distance < block)
    return (near & (here.unsqueeze(-1) == there.unsqueeze(-2))).flatten(0, 1).unsqueeze(1)


def _with_block_before(value: Tensor, missing: int = 0) -> Tensor:
    """(B, K, Q, ...) to (B, K, 2 Q, ...)."""
    before = torch.cat([torch.full_like(value[:, :1], missing), value[:, :-1]], 1)
    return torch.cat([before, value], 2)


def _rotated(value: Tensor, start: int) -> Tensor:
    """Rotate pairs of (B, L, ..., P) by angles that grow with the position, starting at `start`.

    Attention then only depends on relative positions.
    """
    half = value.shape[-1] // 2
    rates = ROTARY_BASE ** -(torch.arange(half, device=value.device) / half)
    positions = torch.arange(start, start + value.shape[1], device=value.device)
    angles = positions.unsqueeze(-1) * rates
    turns = torch.polar(torch.ones_like(angles), angles).view(-1, *(1,) * (value.dim() - 3), half)
    pairs = torch.view_as_complex(torch.unflatten(value, -1, (half, 2)))
    return torch.view_as_real(pairs * turns.to(pairs.dtype)).flatten(-2)
