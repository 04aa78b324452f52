"""The two sequence operations of a selective state-space layer, with backward passes by hand.

`causal_conv_silu` mixes a few neighbouring tokens per channel; `chunked_scan` runs the linear
recurrence over the whole sequence. Both are plain PyTorch, exact for any length, and both stop
at document boundaries. Autograd would keep, and walk through, several times as much memory:
both operations are bound by memory, so that is where their time went.

Shapes: B batch, T time, K chunks, Q positions in a chunk, H heads, P width of a head, N state,
C channels, W taps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["causal_conv_silu", "chunked_scan"]

LOG2_E = 1 / math.log(2)


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None) -> Tensor:
    """Convolve each channel with its own short causal filter, then apply SiLU.

    Args:
        x: `(B, T, C)`, float32 or a narrower float type.
        weight: `(W, C)`; `weight[k]` multiplies the token k places back.
        bias: `(C,)`.
        document: `(B, T)` numbers that change where a new document starts; no tap reaches over
            such a place. None: every row is one document.

    Returns:
        `(B, T, C)` in the type of `x`; sums are taken in the type of `weight`.
    """
    result: Tensor = _CausalConvSiLU.apply(x, weight, bias, document)
    return result


class _CausalConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, document)
        return F.silu(_convolved(x.to(weight.dtype), weight, bias, document)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, document = ctx.saved_tensors
        wide = x.to(weight.dtype)
        before_silu = _convolved(wide, weight, bias, document)
        grad_sum = torch.ops.aten.silu_backward(grad.to(weight.dtype), before_silu)
        grad_x = grad_sum * weight[0]
        grad_weight = [(grad_sum * wide).sum((0, 1))]
        for lag in range(1, min(len(weight), x.shape[1])):
            arriving = _arriving(grad_sum[:, lag:], document, lag)
            grad_x[:, :-lag].addcmul_(arriving, weight[lag])
            grad_weight.append((arriving * wide[:, :-lag]).sum((0, 1)))
        unused = [torch.zeros_like(bias)] * (len(weight) - len(grad_weight))
        grad_bias = grad_sum.sum((0, 1))
        return grad_x.to(x.dtype), torch.stack(grad_weight + unused), grad_bias, None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None) -> Tensor:
    total = torch.addcmul(bias, x, weight[0])
    for lag in range(1, min(len(weight), x.shape[1])):
        total[:, lag:].addcmul_(_arriving(x[:, :-lag], document, lag), weight[lag])
    return total


def _arriving(values: Tensor, document: Tensor | None, lag: int) -> Tensor:
    """Zero the values whose `lag` places lead over a document boundary."""
    if document is None:
        return values
    return values * (document[:, lag:] == document[:, :-lag]).unsqueeze(-1)


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    document: Tensor | None,
    chunk_length: int,
) -> Tensor:
    """Run `S_t = exp(log_decay_t) S_{t-1} + dt_t b_t x_t` and read `y_t = c_t S_t + skip x_t`.

    Inside a chunk the recurrence is unrolled into matrix products; between chunks only the
    state is passed on, in float32 (or wider, if `dt` is). Time and memory are linear in T.

    Args:
        x: `(B, T, H, P)`, the input of each head; its type is that of the matrix products.
        dt: `(B, T, H)`, how strongly a token is written; float32.
        log_decay: `(B, T, H)`, at most 0: the logarithm of what remains of the state; float32.
        b: `(B, T, N)`, where a token is written; shared by the heads.
        c: `(B, T, N)`, where a token reads; shared by the heads.
        skip: `(H,)`, the part of the input that goes straight to the output.
        document: `(B, T)` non-decreasing numbers of documents; the state is zero where a new
            one starts. None: every row is one document.
        chunk_length: positions per chunk; changes speed and rounding only.

    Returns:
        `(B, T, H, P)` in the type of `x`.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 6 (block decomposition). The
        gradient of the decays uses `d/d log(decay) = <dy, y> - <x, dx>` summed backwards in
        time (Yang et al. 2024, "Gated Linear Attention", section 4 and appendix C) instead of
        differentiating the pairwise decays.
    """
    length = x.shape[1]
    chunk = min(chunk_length, length)
    missing = -length % chunk
    if missing:
        x, dt, log_decay, b, c = (_pad_time(value, missing) for value in (x, dt, log_decay, b, c))
        document = None if document is None else _pad_time(document, missing)
    y: Tensor = _ChunkedScan.apply(x, dt, log_decay, b, c, skip, document, chunk)
    return y[:, :length] if missing else y


def _pad_time(value: Tensor, missing: int) -> Tensor:
    return F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))


class _Decays(NamedTuple):
    """What is left of a state on its way through a chunk; 0 across a document boundary."""

    sums: Tensor
    """(B, K, Q, H) log decay since the chunk's start, in powers of two."""
    from_start: Tensor
    """(B, K, Q, H, 1) from the chunk's start to each position."""
    to_end: Tensor
    """(B, K, Q, H, 1) from each position to the chunk's end."""
    across: Tensor
    """(B, K, 1, H, 1) through the whole chunk."""
    visible: Tensor
    """(Q, Q) or (B, K, Q, Q) 1 where the second position may reach the first, else 0."""

    @classmethod
    def of(cls, log_decay: Tensor, document: Tensor | None) -> _Decays:
        """`log_decay` is (B, K, Q, H), `document` is (B, K, Q)."""
        sums = (log_decay * LOG2_E).cumsum(2)
        last = sums[:, :, -1:]
        from_start, to_end, across = (torch.exp2(part) for part in (sums, last - sums, last))
        visible = torch.ones(sums.shape[2], sums.shape[2], device=sums.device).tril()
        if document is not None:
            final = document[:, :, -1:]
            before = torch.cat([document[:, :1, :1], final[:, :-1]], 1)
            from_start = from_start * (document == before).unsqueeze(-1)
            to_end = to_end * (document == final).unsqueeze(-1)
            across = across * (final == before).unsqueeze(-1)
            visible = visible * (document.unsqueeze(-1) == document.unsqueeze(-2))
        return cls(
            sums, from_start.unsqueeze(-1), to_end.unsqueeze(-1), across.unsqueeze(-1), visible
        )

    def pairwise(self) -> Tensor:
        """(B, K, H, Q, Q) decay from the second position to the first, at most 1 everywhere."""
        sums = self.sums.transpose(2, 3)
        # Positions that are not visible would overflow; exp2 because exp is slow on AMD CPUs.
        return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).clamp_max_(0).exp2_()


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        b: Tensor,
        c: Tensor,
        skip: Tensor,
        document: Tensor | None,
        chunk: int,
    ) -> Tensor:
        chunked = [_chunked(value, chunk) for value in (x, dt, log_decay, b, c)]
        x_k, dt_k, log_decay_k, b_k, c_k = chunked
        document_k = None if document is None else _chunked(document, chunk)
        decays = _Decays.of(log_decay_k, document_k)
        written = x_k * dt_k.unsqueeze(-1)

        scores = (c_k @ b_k.mT) * decays.visible
        weights = (decays.pairwise() * scores.unsqueeze(2)).to(x.dtype)
        inside = weights @ written.to(x.dtype).transpose(2, 3)

        additions = b_k.mT @ _flat_heads(written * decays.to_end).to(x.dtype)
        states = _states_before_chunks(additions.to(dt.dtype), decays.across).to(x.dtype)
        y = (c_k @ states).view_as(x_k) * decays.from_start
        y += inside.transpose(2, 3)
        y = y.addcmul_(x_k, skip.unsqueeze(-1)).to(x.dtype)
        ctx.save_for_backward(x_k, dt_k, log_decay_k, b_k, c_k, skip, document_k, states, y)
        return y.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, log_decay, b, c, skip, document, states, y = ctx.saved_tensors
        narrow, wide = x.dtype, dt.dtype
        decays = _Decays.of(log_decay, document)
        grad_y = grad_y.reshape(x.shape)
        written = x * dt.unsqueeze(-1)

        pairwise = decays.pairwise()
        grad_heads = grad_y.transpose(2, 3)
        grad_weights = grad_heads @ written.to(narrow).transpose(2, 3).mT
        grad_scores = ((grad_weights * pairwise).sum(2) * decays.visible).to(narrow)
        scores = (c @ b.mT) * decays.visible
        weights = pairwise.mul_(scores.unsqueeze(2)).to(narrow)
        grad_written = (weights.mT @ grad_heads).transpose(2, 3).to(wide)

        read = _flat_heads(grad_y * decays.from_start).to(narrow)
        grad_states = _gradients_after_chunks((c.mT @ read).to(wide), decays.across)
        grad_narrow = grad_states.to(narrow)
        grad_written.addcmul_((b @ grad_narrow).view_as(x), decays.to_end)
        kept = _flat_heads(written * decays.to_end).to(narrow)
        grad_b = grad_scores.mT @ c + kept @ grad_narrow.mT
        grad_c = grad_scores @ b + read @ states.mT

        grad_wide = grad_y.to(wide)
        grad_dt = (grad_written * x).sum(-1)
        straight = (grad_wide * x).sum(-1)
        grad_sums = (grad_wide * y).sum(-1) - straight * skip - grad_dt * dt
        # What reaches the end of a chunk has passed all its decays.
        reached = torch.zeros_like(grad_sums[:, :, 0])
        by_head = (grad_states[:, :-1] * states[:, 1:]).unflatten(-1, x.shape[-2:])
        reached[:, :-1] = by_head.sum((2, 4))
        grad_sums[:, :, -1] += reached
        grad_log_decay = grad_sums.flip(2).cumsum(2).flip(2)
        grad_x = grad_written.mul_(dt.unsqueeze(-1)).addcmul_(grad_wide, skip.unsqueeze(-1))
        grads = (grad_x.to(narrow), grad_dt, grad_log_decay, grad_b, grad_c)
        unchunked = tuple(grad.flatten(1, 2) for grad in grads)
        return *unchunked, straight.sum((0, 1, 2)), None, None


def _chunked(value: Tensor, chunk: int) -> Tensor:
    """(B, T, ...) to (B, K, Q, ...)."""
    return value.unflatten(1, (-1, chunk))


def _flat_heads(value: Tensor) -> Tensor:
    """(..., H, P) to (..., H * P): what the heads share is one wide matrix product."""
    return value.flatten(-2)


def _states_before_chunks(additions: Tensor, across: Tensor) -> Tensor:
    """The state that enters each chunk, (B, K, N, H * P), from what each chunk adds to it."""
    across = _per_column(across, additions)
    states = torch.empty_like(additions)
    states[:, 0] = 0
    for k in range(1, additions.shape[1]):
        torch.addcmul(additions[:, k - 1], states[:, k - 1], across[:, k - 1], out=states[:, k])
    return states


def _gradients_after_chunks(grad_before: Tensor, across: Tensor) -> Tensor:
    """The gradient of the state that leaves each chunk, from that of what the chunks read."""
    across = _per_column(across, grad_before)
    grads = torch.empty_like(grad_before)
    grads[:, -1] = 0
    for k in reversed(range(1, grad_before.shape[1])):
        torch.addcmul(grad_before[:, k], grads[:, k], across[:, k], out=grads[:, k - 1])
    return grads


def _per_column(across: Tensor, like: Tensor) -> Tensor:
    """(B, K, 1, H, 1) to (B, K, 1, H * P)."""
    width = like.shape[-1] // across.shape[-2]
    return across.expand(-1, -1, -1, -1, width).flatten(-2)
