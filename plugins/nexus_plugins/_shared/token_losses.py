"""The cross-entropy and the divergence of each token, after a linear layer, without full logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_core.errors import DataError
from nexus_plugins._shared.outputs import rows_of

__all__ = ["check_labels", "token_divergence", "token_nats"]

LOGITS_AT_ONCE = 2**24


def token_nats(output: Any, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The cross-entropy of each label, in nats; 0 for ignored labels.

    Args:
        output: a model's output, as accepted by `outputs.rows_of`.
        labels: `(B, T)`.
        ignore_index: label of ignored positions.

    Returns:
        `(B, T)` float32. The backward pass recomputes the logits.

    Raises:
        DataError: labels have another shape.
    """
    rows, head = rows_of(output)
    check_labels(labels, rows)
    counted = labels != ignore_index
    flat, targets = rows.flatten(0, -2), labels.where(counted, 0).flatten()
    if head is None:
        picked = flat.float().gather(1, targets[:, None])[:, 0]
        nats = flat.float().logsumexp(-1) - picked
    else:
        nats = _TokenNats.apply(flat, head, targets)  # type: ignore[no-untyped-call]
    return nats.view(labels.shape) * counted


def check_labels(labels: Tensor, rows: Tensor) -> None:
    """Reject labels that are not one per row of `(..., D)`.

    Raises:
        DataError: they have another shape.
    """
    if labels.shape != rows.shape[:-1]:
        raise DataError(
            f"labels have shape {tuple(labels.shape)}, but the model's output is for "
            f"{tuple(rows.shape[:-1])}; expected one label per position of input_ids"
        )


def token_divergence(
    rows: Tensor,
    head: Tensor | None,
    theirs: Tensor,
    their_head: Tensor | None,
    temperature: float = 1.0,
) -> Tensor:
    """`KL(theirs || own)` of each row, in nats.

    Args:
        rows: `(N, D)` states that `head` turns into logits, or logits `(N, V)`.
        head: `(V, D)`; None: the rows are logits.
        theirs: the distributions to compare with, likewise; without a gradient.
        their_head: their head.
        temperature: divides both logits.

    Returns:
        `(N,)` in float32 or wider. The backward pass recomputes the logits.
    """
    result: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        rows, head, theirs.detach(), their_head, temperature
    )
    return result


def pieces(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows, sized so that their logits stay small."""
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


class _TokenNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.narrow = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        with torch.autocast(device, enabled=False):
            rows, head = hidden.to(ctx.narrow), weight.to(ctx.narrow)
            norms, picked = [], []
            for part in pieces(len(rows), len(head)):
                logits = (rows[part] @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
                norms.append(logits.logsumexp(-1))
                picked.append(logits.gather(1, labels[part][:, None])[:, 0])
        norm = torch.cat(norms) if norms else hidden.new_zeros(0)
        ctx.save_for_backward(hidden, weight, labels, norm)
        return norm - torch.cat(picked) if picked else norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, norm = ctx.saved_tensors
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            rows, head = hidden.to(ctx.narrow), weight.to(ctx.narrow)
            grad_hidden = torch.empty_like(hidden if to_hidden else hidden[:0])
            grad_weight = torch.zeros_like(weight if to_weight else weight[:0], dtype=norm.dtype)
            for part in pieces(len(rows), len(head)):
                logits = (rows[part] @ head.T).to(norm.dtype)
                slope = (logits - norm[part][:, None]).exp_()
                slope[torch.arange(len(slope), device=slope.device), labels[part]] -= 1
                narrow = slope.mul_(grad[part][:, None]).to(ctx.narrow)
                if to_hidden:
                    grad_hidden[part] = narrow @ head
                if to_weight:
                    grad_weight += narrow.T @ rows[part]
        return (
            grad_hidden if to_hidden else None,
            grad_weight.to(weight.dtype) if to_weight else None,
            None,
        )


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor | None,
        theirs: Tensor,
        their_head: Tensor | None,
        temperature: float,
    ) -> Tensor:
        device = rows.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.narrow = torch.get_autocast_dtype(device) if autocast else rows.dtype
        ctx.temperature = temperature
        vocabulary = rows.shape[-1] if head is None else len(head)
        wide = torch.promote_types(rows.dtype, torch.float32)
        found, norms = [rows.new_zeros(0, dtype=wide)], []
        with torch.autocast(device, enabled=False):
            for part in pieces(len(rows), vocabulary):
                own, target = (
                    _logits(states[part], of, ctx.narrow, temperature)
                    for states, of in ((rows, head), (theirs, their_head))
                )
                norms.append(torch.stack([own.logsumexp(-1), target.logsumexp(-1)]))
                chances = (target - norms[-1][1, :, None]).exp_()
                gap = torch.einsum("nv,nv->n", chances, target - own)
                found.append((gap + norms[-1][0] - norms[-1][1]).clamp_min_(0))
        ctx.save_for_backward(rows, head, theirs, their_head, *norms)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, head, theirs, their_head, *norms = ctx.saved_tensors
        to_rows, to_head = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows if to_rows else rows[:0])
        grad_head = torch.zeros_like(head, dtype=grad.dtype) if to_head else None
        vocabulary = rows.shape[-1] if head is None else len(head)
        with torch.autocast(rows.device.type, enabled=False):
            for part, norm in zip(pieces(len(rows), vocabulary), norms, strict=True):
                own, target = (
                    (
                        _logits(states[part], of, ctx.narrow, ctx.temperature) - of_norm[:, None]
                    ).exp_()
                    for states, of, of_norm in zip(
                        (rows, theirs), (head, their_head), norm, strict=True
                    )
                )
                slope = own.sub_(target).mul_((grad[part] / ctx.temperature)[:, None])
                if head is None:
                    grad_rows[part] = slope
                    continue
                slope = slope.to(ctx.narrow)
                if to_rows:
                    grad_rows[part] = slope @ head.to(ctx.narrow)
                if grad_head is not None:
                    grad_head += slope.T @ rows[part].to(ctx.narrow)
        return (
            grad_rows if to_rows else None,
            grad_head.to(head.dtype) if grad_head is not None else None,
            None,
            None,
            None,
        )


def _logits(rows: Tensor, head: Tensor | None, narrow: torch.dtype, temperature: float) -> Tensor:
    """Logits over the temperature, in float32 or wider, multiplied in a narrow type."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    logits = (rows if head is None else rows.to(narrow) @ head.to(narrow).T).to(wide)
    return logits if temperature == 1 else logits / temperature
