"""The operations of a selective state-space layer, with manual backward passes.

`causal_conv_silu` mixes a few neighbouring tokens per channel; `chunked_scan` runs the linear
recurrence over the whole sequence; both stop at document boundaries. All are plain PyTorch, and all
are memory-bound. So they save for the backward pass only what is costly to recompute, and on CPU
they process the sequence in blocks whose intermediate values stay in cache.

Shapes: B batch, T time, K chunks, Q positions in a chunk, H heads, P width of a head, N state,
C channels, W taps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_plugins._shared.running_sum import running_sum

__all__ = ["Decays", "blocks_of", "causal_conv_silu", "chunked", "chunked_scan", "pad_time"]

LOG2_E = 1 / math.log(2)
TOKENS_IN_CACHE = 1024


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None) -> Tensor:
    """Convolve each channel with its own short causal filter, then apply SiLU.

    Args:
        x: `(B, T, C)`, float32 or a narrower float type.
        weight: `(W, C)`; `weight[k]` multiplies the token k positions back.
        bias: `(C,)`.
        document: `(B, T)` numbers that change where a new document starts; no tap crosses such a
            position. None: each row is one document.

    Returns:
        `(B, T, C)` in the dtype of `x`; sums are accumulated in the dtype of `weight`.
    """
    result: Tensor = _CausalConvSiLU.apply(x, weight, bias, document)  # type: ignore[no-untyped-call]
    return result


class _CausalConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, document: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, document)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows, span in blocks_of(x, 1):
            window, same = _window(x, document, rows, span, weight)
            y[rows, span] = F.silu(_convolved(window, weight, bias, same))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, document = ctx.saved_tensors
        taps = len(weight)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        grad_before_later_block = weight.new_zeros(())
        for rows, span in blocks_of(x, 1, backwards=True):
            window, same = _window(x, document, rows, span, weight)
            grad_sum = torch.ops.aten.silu_backward(
                grad[rows, span].to(weight.dtype), _convolved(window, weight, bias, same)
            )
            grad_bias += grad_sum.sum((0, 1))
            if span.stop == x.shape[1]:
                grad_before_later_block = weight.new_zeros(())
            grad_window = torch.zeros_like(window)
            grad_window[:, span.stop - span.start :] = grad_before_later_block
            for lag in range(taps):
                seen = _seen(window, taps, lag)
                arriving = grad_sum if same is None else grad_sum * same[lag]
                _seen(grad_window, taps, lag).addcmul_(arriving, weight[lag])
                grad_weight[lag] += (arriving * seen).sum((0, 1))
            grad_x[rows, span] = grad_window[:, taps - 1 :]
            grad_before_later_block = grad_window[:, : taps - 1]
        return grad_x, grad_weight, grad_bias, None


def _window(
    x: Tensor, document: Tensor | None, rows: slice, span: slice, weight: Tensor
) -> tuple[Tensor, list[Tensor] | None]:
    """The inputs of the filters: `span` and the positions before it, and the mask for each lag."""
    reach = len(weight) - 1
    begin = max(0, span.start - reach)
    missing = reach - (span.start - begin)
    window = F.pad(x[rows, begin : span.stop].to(weight.dtype), (0, 0, missing, 0))
    if document is None:
        return window, None
    numbers = F.pad(document[rows, begin : span.stop], (missing, 0)).unsqueeze(-1)
    here = _seen(numbers, len(weight), 0)
    return window, [_seen(numbers, len(weight), lag) == here for lag in range(len(weight))]


def _seen(window: Tensor, taps: int, lag: int) -> Tensor:
    """The inputs of the block's positions, `lag` positions back."""
    start = taps - 1 - lag
    return window[:, start : window.shape[1] - lag]


def _convolved(window: Tensor, weight: Tensor, bias: Tensor, same: list[Tensor] | None) -> Tensor:
    taps = len(weight)
    total = torch.addcmul(bias, _seen(window, taps, 0), weight[0])
    for lag in range(1, taps):
        seen = _seen(window, taps, lag)
        total.addcmul_(seen if same is None else seen * same[lag], weight[lag])
    return total


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

    Within a chunk the recurrence is unrolled into matmuls; only the state is passed between chunks,
    in float32 (or wider, if `dt` is). Time and memory are linear in T.

    Args:
        x: `(B, T, H, P)`, the input of each head; its dtype is that of the matmuls.
        dt: `(B, T, H)`, how strongly a token is written; float32.
        log_decay: `(B, T, H)`, at most 0: the logarithm of what remains of the state; float32.
        b: `(B, T, N)`, where a token is written; shared by the heads.
        c: `(B, T, N)`, where a token reads; shared by the heads.
        skip: `(H,)`, the weight of the skip connection from input to output.
        document: `(B, T)` non-decreasing numbers of documents; the state is cleared where a new one
            starts. None: each row is one document.
        chunk_length: positions per chunk; affects only speed and rounding.

    Returns:
        `(B, T, H, P)` in the dtype of `x`.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 6 (block decomposition). The
        gradient of the decays goes through the pairwise decays, as in the stable kernels of its
        authors. The shorter `<dy, y> - <x, dx>`, summed backwards in time (Yang et al. 2024,
        "Gated Linear Attention", appendix C), is a difference of large numbers: in bfloat16 its
        rounding can exceed the gradient.
    """
    length = x.shape[1]
    chunk = min(chunk_length, length)
    missing = -length % chunk
    if missing:
        x, dt, log_decay, b, c = (pad_time(value, missing) for value in (x, dt, log_decay, b, c))
        document = None if document is None else pad_time(document, missing)
    y: Tensor = _ChunkedScan.apply(x, dt, log_decay, b, c, skip, document, chunk)  # type: ignore[no-untyped-call]
    return y[:, :length] if missing else y


def pad_time(value: Tensor, missing: int) -> Tensor:
    """(B, T, ...) with zeros after the last position."""
    return F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))


class Decays(NamedTuple):
    """How much of a state remains along a chunk; 0 across a document boundary."""

    sums: Tensor
    """(B, K, Q, H) log decay since the chunk's start, in powers of two."""
    from_start: Tensor
    """(B, K, Q, H, 1) from the chunk's start to each position."""
    to_end: Tensor
    """(B, K, Q, H, 1) from each position to the chunk's end."""
    across: Tensor
    """(B, K, 1, H, 1) through the whole chunk."""
    document: Tensor | None
    """(B, K, Q)"""

    @classmethod
    def of(cls, log_decay: Tensor, document: Tensor | None) -> Decays:
        """`log_decay` is (B, K, Q, H), `document` is (B, K, Q)."""
        sums = running_sum(log_decay * LOG2_E, 2)
        last = sums[:, :, -1:]
        from_start, to_end, across = (torch.exp2(part) for part in (sums, last - sums, last))
        if document is not None:
            final = document[:, :, -1:]
            before = torch.cat([document[:, :1, :1], final[:, :-1]], 1)
            from_start = from_start * (document == before).unsqueeze(-1)
            to_end = to_end * (document == final).unsqueeze(-1)
            across = across * (final == before).unsqueeze(-1)
        from_start, to_end, across = (p.unsqueeze(-1) for p in (from_start, to_end, across))
        return cls(sums, from_start, to_end, across, document)

    def at(self, block: tuple[slice, slice]) -> Decays:
        """Select some rows and chunks."""
        sums, from_start, to_end, across = (part[block] for part in self[:4])
        document = None if self.document is None else self.document[block]
        return Decays(sums, from_start, to_end, across, document)

    def pairwise(self) -> Tensor:
        """`(B, K, H, Q, Q)`: decay from the second position to the first, at most 1."""
        sums = self.sums.transpose(2, 3).contiguous()
        # Without the clamp, pairs that are not visible would overflow. A base of two because
        # torch.exp on CPUs takes three times as long.
        return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).clamp_max_(0).exp2_()

    def visible(self) -> Tensor:
        """`(Q, Q)` or `(B, K, Q, Q)`: 1 if the first position may see the second, else 0."""
        chunk = self.sums.shape[2]
        earlier = torch.ones(chunk, chunk, dtype=self.sums.dtype, device=self.sums.device).tril()
        if self.document is None:
            return earlier
        return earlier * (self.document.unsqueeze(-1) == self.document.unsqueeze(-2))


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
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y_chunks = chunked(y, chunk)
        x, dt, log_decay, b, c = (chunked(value, chunk) for value in (x, dt, log_decay, b, c))
        document = None if document is None else chunked(document, chunk)
        decays = Decays.of(log_decay, document)
        states = x.new_empty(*b.shape[:2], b.shape[-1], x.shape[-2] * x.shape[-1])
        state = dt.new_zeros(())
        for block in blocks_of(x, chunk):
            if block[1].start == 0:
                state = dt.new_zeros(())
            y_chunks[block], state = _scan_block(
                x[block], dt[block], b[block], c[block], skip, decays.at(block), state,
                states[block],
            )  # fmt: skip
        ctx.save_for_backward(x, dt, log_decay, b, c, skip, document, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, log_decay, b, c, skip, document, states = ctx.saved_tensors
        grad_y = chunked(grad_y, x.shape[2])
        decays = Decays.of(log_decay, document)
        grads = tuple(
            torch.empty(value.shape, dtype=value.dtype, device=value.device)
            for value in (x, dt, log_decay, b, c)
        )
        grad_skip = torch.zeros_like(skip)
        grad_state = dt.new_zeros(())
        for block in blocks_of(x, x.shape[2], backwards=True):
            if block[1].stop == x.shape[1]:
                grad_state = dt.new_zeros(())
            *block_grads, straight, grad_state = _scan_block_backward(
                grad_y[block], x[block], dt[block], b[block], c[block], skip, decays.at(block),
                states[block], grad_state,
            )  # fmt: skip
            for whole, part in zip(grads, block_grads, strict=True):
                whole[block] = part
            grad_skip += straight
        return *(grad.flatten(1, 2) for grad in grads), grad_skip, None, None


def _scan_block(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    decays: Decays,
    state: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scan some chunks; fills `states` with those entering each; returns y and the last state."""
    narrow, wide = x.dtype, dt.dtype
    x = x.to(wide)
    written = x * dt.unsqueeze(-1)
    weights = decays.pairwise().mul_(_scores(b, c, decays).unsqueeze(2)).to(narrow)
    inside = weights @ written.to(narrow).transpose(2, 3)

    additions = (b.mT @ (written * decays.to_end).flatten(-2).to(narrow)).to(wide)
    across = _per_column(decays.across, x)
    for k in range(x.shape[1]):
        states[:, k] = state
        state = torch.addcmul(additions[:, k], state, across[:, k])
    y = (c @ states).view_as(x).to(wide).mul_(decays.from_start)
    y.add_(inside.transpose(2, 3)).addcmul_(x, skip.unsqueeze(-1))
    return y.to(narrow), state


def _scan_block_backward(
    grad_y: Tensor,
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    decays: Decays,
    states: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, log decay, b, c, skip and of the state before the block."""
    narrow, wide = x.dtype, dt.dtype
    heads = grad_y.transpose(2, 3).contiguous()
    x, grad_y = x.to(wide), grad_y.to(wide)
    written = x * dt.unsqueeze(-1)
    grad_inside, grad_scores, grad_sums = _pairs_backward(heads, written.to(narrow), b, c, decays)

    grad_read = grad_y * decays.from_start
    grad_sums = grad_sums + (c @ states).view_as(x).to(wide).mul_(grad_read).sum(-1)
    read = grad_read.flatten(-2).to(narrow)
    grad_before = (c.mT @ read).to(wide)
    across = _per_column(decays.across, x)
    grad_leaving = torch.empty_like(grad_before)
    for k in reversed(range(x.shape[1])):
        grad_leaving[:, k] = grad_state
        grad_state = torch.addcmul(grad_before[:, k], grad_state, across[:, k])
    narrow_leaving = grad_leaving.to(narrow)
    grad_kept = (b @ narrow_leaving).view_as(x).to(wide).mul_(decays.to_end)
    grad_to_end = (grad_kept * written).sum(-1)
    grad_written = grad_kept.add_(grad_inside)
    kept = written.mul_(decays.to_end).flatten(-2).to(narrow)
    grad_b = grad_scores.mT @ c + kept @ narrow_leaving.mT
    grad_c = grad_scores @ b + read @ states.mT

    # The state written at a position has passed the decays after it; the state that entered the
    # chunk has passed all of them.
    passed = torch.unflatten(grad_leaving.mul_(states), -1, x.shape[-2:]).sum((2, 4))
    grad_sums[:, :, -1] += grad_to_end.sum(2) + passed * decays.across.flatten(2)
    grad_log_decay = running_sum((grad_sums - grad_to_end).flip(2), 2).flip(2)
    grad_dt = (grad_written * x).sum(-1)
    grad_skip = (grad_y * x).sum(-1).sum((0, 1, 2))
    grad_x = grad_written.mul_(dt.unsqueeze(-1)).addcmul_(grad_y, skip.unsqueeze(-1))
    return grad_x, grad_dt, grad_log_decay, grad_b, grad_c, grad_skip, grad_state


def _pairs_backward(
    grad_heads: Tensor, written: Tensor, b: Tensor, c: Tensor, decays: Decays
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of the interactions within a chunk.

    Args:
        grad_heads: (B, K, H, Q, P), the gradient of the output.
        written: (B, K, Q, H, P).

    Returns:
        Gradients of `written`, of the scores, and (B, K, Q, H) of the sums of log decays.
    """
    pairwise, scores = decays.pairwise(), _scores(b, c, decays).unsqueeze(2)
    grad_weights = (grad_heads @ written.transpose(2, 3).mT).to(scores.dtype).mul_(pairwise)
    grad_scores = grad_weights.sum(2).mul_(decays.visible()).to(written.dtype)
    # A pair decays from its second position to its first. The decays outside of it see it in
    # both of these sums, which must take the same rounded number for it to cancel.
    by_pair = grad_weights.mul_(scores)
    grad_sums = (by_pair.sum(-1) - by_pair.sum(-2)).transpose(2, 3)
    weights = pairwise.mul_(scores).to(written.dtype)
    grad_written = (weights.mT @ grad_heads).transpose(2, 3)
    return grad_written, grad_scores, grad_sums


def _scores(b: Tensor, c: Tensor, decays: Decays) -> Tensor:
    """(B, K, Q, Q): the weight with which each position reads each visible one, before decay."""
    return (c @ b.mT).to(decays.sums.dtype).mul_(decays.visible())


def _per_column(across: Tensor, x: Tensor) -> Tensor:
    """(B, K, 1, H, 1) to (B, K, 1, H * P)."""
    return across.expand(-1, -1, -1, -1, x.shape[-1]).flatten(-2)


def chunked(value: Tensor, chunk: int) -> Tensor:
    """(B, T, ...) to (B, K, Q, ...)."""
    return torch.unflatten(value, 1, (-1, chunk))


def blocks_of(
    value: Tensor, tokens_per_item: int, backwards: bool = False
) -> Iterator[tuple[slice, slice]]:
    """Split (rows, time) into blocks that fit the cache; time varies fastest.

    Args:
        value: `(B, L, ...)`, L items in time.
        tokens_per_item: 1, or the length of a chunk.
        backwards: later items first.
    """
    rows, length = value.shape[:2]
    at_once = TOKENS_IN_CACHE if value.device.type == "cpu" else rows * length * tokens_per_item
    span = min(length, max(1, at_once // tokens_per_item))
    group = max(1, at_once // (span * tokens_per_item))
    starts = range(0, length, span)
    for row in range(0, rows, group):
        for start in reversed(starts) if backwards else starts:
            yield slice(row, min(row + group, rows)), slice(start, min(start + span, length))
