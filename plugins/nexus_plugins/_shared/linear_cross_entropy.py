"""Cross-entropy after a linear layer, without full logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_cross_entropy"]

LOGITS_AT_ONCE = 2**25  # enough for a fast matrix product
LOGITS_ON_CPU = 2**23  # enough on the CPU
LOGITS_IN_CACHE = 2**18  # the softmax reads its input several times
FLOAT16_ROWS = 4096  # sums over more rows may exceed its 65,504, whatever scale the loss has


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T, ..., reduction="sum")`, a few rows of logits at a time.

    Args:
        hidden: `(n, D)`.
        weight: `(V, D)`, the weight of the output layer.
        labels: `(n,)`, ids below V, or `ignore_index`.
        label_smoothing: share of the target that is spread over all ids.
        ignore_index: label of ignored rows.

    Returns:
        The sum in nats, 0-d; 0 if all rows are ignored.

    Source: Hsu et al. 2024, "Liger Kernel": the gradients are computed in the forward pass, while
    the logits exist. Here the terms of label smoothing, which have rank one, are computed without
    logits.
    """
    counted = labels != ignore_index
    chosen = _dropped if hidden.is_cpu else _emptied
    hidden, labels, silent = chosen(hidden, labels, counted)
    inputs = (hidden, weight, labels, label_smoothing, torch.is_grad_enabled())
    loss: Tensor = _LinearCrossEntropy.apply(*inputs)  # type: ignore[no-untyped-call]
    return loss - math.log(len(weight)) * silent


def _dropped(hidden: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drop ignored rows, so that they cost nothing."""
    if not counted.all():
        hidden, labels = hidden[counted], labels[counted]
    return hidden, labels, hidden.new_zeros(())


def _emptied(hidden: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Set ignored rows to zero, which needs no device sync, unlike dropping them.

    All logits of such a row are zero, so its loss is `log V`, and it adds nothing to any gradient.
    The third result is their number.
    """
    silent = (~counted).sum().to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden.where(counted.unsqueeze(-1), 0), labels.where(counted, 0), silent


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, train: bool
    ) -> Tensor:
        to_hidden, to_weight = (train and needed for needed in ctx.needs_input_grad[:2])
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        narrow = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            rows, head = hidden.to(narrow), weight.to(narrow)
            share = smoothing / len(weight)
            spread_head, spread_hidden = (v.sum(0, dtype=wide) * share for v in (weight, hidden))
            total = -(hidden.to(wide) @ spread_head).sum()
            grad_hidden = torch.empty_like(hidden if to_hidden else hidden[:0])
            grad_weight = (-spread_hidden).repeat(len(weight) if to_weight else 0, 1)
            size = _rows_at_once(len(weight), narrow, hidden.is_cpu)
            room = rows.new_empty(min(size, len(rows)), len(weight))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                logits = torch.mm(rows[part], head.T, out=room[: len(rows[part])])
                total += _to_gradient(logits, labels[part], 1 - smoothing)
                if to_hidden:
                    grad_hidden[part] = logits @ head - spread_head
                if to_weight:
                    _add_product(grad_weight, logits.T, rows[part])
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        return (
            grad_hidden * grad if to_hidden else None,
            grad_weight * grad if to_weight else None,
            *(None, None, None),
        )


def _rows_at_once(vocabulary: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """How many rows fit a chunk without overflow in the product with their gradients."""
    most = min(LOGITS_AT_ONCE, LOGITS_ON_CPU) if on_cpu else LOGITS_AT_ONCE
    rows = max(1, most // vocabulary)
    return min(rows, FLOAT16_ROWS) if dtype == torch.float16 else rows


def _to_gradient(logits: Tensor, labels: Tensor, confidence: float) -> Tensor:
    """Replace logits by `softmax - confidence * one_hot`, their gradient; return their loss."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    picked = logits.gather(1, labels.unsqueeze(1))
    total = -confidence * picked.sum(dtype=wide)
    for block in torch.split(logits, max(1, LOGITS_IN_CACHE // logits.shape[1])):
        weights = block.to(wide)  # the block itself, if it has this dtype
        peak = weights.amax(-1, keepdim=True)
        whole = weights.sub_(peak).exp_().sum(-1, keepdim=True)
        total += (peak + whole.log()).sum()
        block.copy_(weights.mul_(whole.reciprocal()))
    logits[torch.arange(len(labels), device=labels.device), labels] -= confidence
    return total


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product in place, without a temporary if the dtypes match."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
