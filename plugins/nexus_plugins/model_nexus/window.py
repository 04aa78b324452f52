"""Attention over the last few tokens, with cost linear in length and a cache of constant size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nexus_plugins.model_nexus.norms import gradient_of_norm
from nexus_plugins.model_nexus.operations import pad_time
from nexus_plugins.model_nexus.residual import widened

__all__ = ["WindowAttention", "WindowState", "head_width"]

ROTARY_BASE = 10_000.0


class WindowState(NamedTuple):
    """The last tokens' keys and values: constant in size."""

    keys: Tensor
    """(B, W - 1, G, P), oldest first."""
    values: Tensor
    """(B, W - 1, G, P)"""
    filled: Tensor
    """(B, W - 1): whether there is a token."""


class WindowAttention(nn.Module):
    """Each token attends to the last `window` tokens, including itself.

    Shapes: B batch, T time, D model, H = D / head_dim heads of P, W window.

    Args:
        d_model: width D of input and output.
        head_dim: maximum width P of a head: the largest even divisor of D is used.
        window: tokens W that each token sees.
        kv_heads: key and value heads G, a divisor of H, each for H / G query heads; None: H.

    Source: Beltagy et al. 2020, "Longformer" (windows), in blocks of W that see the block before
        them; Su et al. 2021, "RoFormer" (rotary positions), relative to the window; queries and
        keys are normalized as in Henry et al. 2020, "Query-Key Normalization", by RMS; heads share
        keys and values as in Ainslie et al. 2023, "GQA".
    """

    def __init__(
        self, d_model: int, head_dim: int = 64, window: int = 128, kv_heads: int | None = None
    ) -> None:
        super().__init__()
        self.window = window
        self.head_dim = head_width(d_model, head_dim)
        self.heads = d_model // self.head_dim
        self.kv_heads = kv_heads or self.heads
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.in_proj = nn.Linear(d_model, width, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, document: Tensor | None = None) -> Tensor:
        """Mix whole sequences `(B, T, D)`; `document` as in `SelectiveSSM.forward`."""
        turns = _turns(x.shape[1], self.head_dim, x.device)
        query, key, value = _prepared(self._project(x), turns, self.kv_heads)
        if x.shape[1] <= self.window:
            y = _attend(query, key, value, _of_one_document(document))
        else:
            y = self._attend_in_blocks(query, key, value, document)
        result: Tensor = self.out_proj(y.flatten(-2))
        return result

    def _attend_in_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, document: Tensor | None
    ) -> Tensor:
        """Attend from each block of W tokens to itself and the block before."""
        batch, length = query.shape[:2]
        query, key, value = (
            torch.unflatten(pad_time(part, -length % self.window), 1, (-1, self.window))
            for part in (query, key, value)
        )
        key, value = _with_block_before(key), _with_block_before(value)
        mask = _mask_of_blocks(batch, length, self.window, document, query.device)
        y = _attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask)
        return torch.unflatten(y, 0, (batch, -1)).flatten(1, 2)[:, :length]

    def step(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """Read one token `(B, D)`; equal to `forward` up to rounding."""
        heads = self._project(x.unsqueeze(1))
        query, key, value = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], 2)
        turns = _turns(self.window, self.head_dim, x.device)
        keys = torch.cat([state.keys, _unit(key)[0]], 1)
        values = torch.cat([state.values, value], 1)
        filled = F.pad(state.filled, (0, 1), value=True)
        query = _rotated(_unit(query)[0], turns[-1:]).to(value.dtype)
        seen = _rotated(keys, turns).to(value.dtype)
        y = _attend(query, seen, values, filled[:, None, None])
        output: Tensor = self.out_proj(y.flatten(1))
        return output, WindowState(keys[:, 1:], values[:, 1:], filled[:, 1:])

    def initial_state(self, batch: int) -> WindowState:
        """The state before the first token, for `batch` sequences."""
        past = batch, self.window - 1
        empty = self.in_proj.weight.new_zeros(*past, self.kv_heads, self.head_dim)
        filled = torch.zeros(past, dtype=torch.bool, device=empty.device)
        return WindowState(widened(empty), empty, filled)

    def _project(self, x: Tensor) -> Tensor:
        """Query, key and value heads, (B, T, H + 2 G, P)."""
        return torch.unflatten(self.in_proj(x), -1, (-1, self.head_dim))


def head_width(d_model: int, most: int) -> int:
    """The largest even divisor of an even width up to a limit.

    Raises:
        ValueError: the width is odd, or the limit below 2.
    """
    if d_model % 2 or most < 2:
        raise ValueError(
            f"width {d_model} has no even divisor of at most {most}; use an even width"
        )
    return next(n for n in range(most, 1, -1) if n % 2 == 0 and d_model % n == 0)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, Q, H, P) to (B, L, G, P)."""
    shared = query.shape[2] // key.shape[2]
    key, value = (_repeated(part, shared) for part in (key, value))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
    return y.transpose(1, 2)


def _repeated(heads: Tensor, times: int) -> Tensor:
    """(B, L, G, P) to (B, L, G * times, P), each head for a group of queries."""
    return heads.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (..., P) to a mean square of one over P; in float32 or wider, with the scale."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = x.shape[-1] ** 0.5 / length.clamp_min(1e-6)
    return (wide * scale).contiguous(), scale


def _prepared(heads: Tensor, turns: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of (B, T, H + 2 G, P), normalized and rotated, and values."""
    if not torch.compiler.is_compiling():
        result: tuple[Tensor, Tensor, Tensor] = _Heads.apply(heads, turns, kv_heads)  # type: ignore[no-untyped-call]
        return result
    turned, value = torch.tensor_split(heads, (-kv_heads,), 2)  # the compiler fuses these better
    y = _rotated(_unit(turned)[0], turns).to(value.dtype)
    query, key = torch.tensor_split(y, (-kv_heads,), 2)
    return query, key, value


class _Heads(Function):
    """Queries and keys, normalized and rotated, and values, with one gradient for all three.

    A manual backward pass has a third of autograd's memory traffic.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, turns: Tensor, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        turned, value = torch.tensor_split(heads, (-kv_heads,), 2)
        y, scale = _unit(turned)
        _as_pairs(y).mul_(turns)
        ctx.save_for_backward(y, scale, turns)
        query, key = torch.tensor_split(y.to(value.dtype), (-kv_heads,), 2)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        y, scale, turns = ctx.saved_tensors
        batch, length, turned, width = y.shape
        result = y.new_empty(batch, length, turned + grads[2].shape[2], width)
        out, value = torch.split(result, [turned, grads[2].shape[2]], 2)
        gradient = gradient_of_norm(torch.cat(grads[:2], 2).to(y.dtype), y, scale)
        torch.mul(_as_pairs(gradient), turns.conj(), out=_as_pairs(out))
        value.copy_(grads[2])
        return result, None, None


def _of_one_document(document: Tensor | None) -> Tensor | None:
    """(B, 1, T, T): what each position of a row sees; None: everything up to itself."""
    if document is None:
        return None
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).tril().unsqueeze(1)


def _mask_of_blocks(
    batch: int, length: int, block: int, document: Tensor | None, device: torch.device
) -> Tensor:
    """(B * K, 1, Q, 2 Q): what each position sees of its block and the block before."""
    if document is None:
        document = torch.zeros(batch, length, dtype=torch.long, device=device)
    here = torch.unflatten(pad_time(document, -length % block), 1, (-1, block))
    there = _with_block_before(here, -1)
    distance = torch.arange(block, device=device).unsqueeze(-1) - torch.arange(
        -block, block, device=device
    )
    near = (distance >= 0) & (distance < block)
    return (near & (here.unsqueeze(-1) == there.unsqueeze(-2))).flatten(0, 1).unsqueeze(1)


def _with_block_before(value: Tensor, missing: int = 0) -> Tensor:
    """(B, K, Q, ...) to (B, K, 2 Q, ...)."""
    before = torch.cat([torch.full_like(value[:, :1], missing), value[:, :-1]], 1)
    return torch.cat([before, value], 2)


def _turns(length: int, width: int, device: torch.device) -> Tensor:
    """(L, 1, P / 2) complex numbers that rotate pairs by angles that grow with the position.

    Attention depends only on relative positions.
    """
    half = width // 2
    rates = ROTARY_BASE ** -(torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device).unsqueeze(-1) * rates
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def _rotated(value: Tensor, turns: Tensor) -> Tensor:
    """Rotate (B, L, H, P)."""
    return torch.view_as_real(_as_pairs(value) * turns).flatten(-2)


def _as_pairs(value: Tensor) -> Tensor:
    """View (..., P) as complex numbers (..., P / 2)."""
    return torch.view_as_complex(torch.unflatten(value, -1, (-1, 2)))
