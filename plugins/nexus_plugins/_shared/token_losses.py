"""The cross-entropy and the divergence of each token, after a linear layer, without full logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

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
        `(N,)` float32. The backward pass recomputes the logits.
    """
    vocabulary = rows.shape[-1] if head is None else len(head)
    found = [
        checkpoint(
            _of_rows, rows[part], head, theirs[part], their_head, temperature,
            use_reentrant=False, preserve_rng_state=False,
        )
        for part in pieces(len(rows), vocabulary)
    ]  # fmt: skip
    return torch.cat(found) if found else rows.sum(-1, dtype=torch.float32)


def _of_rows(
    rows: Tensor, head: Tensor | None, theirs: Tensor, their_head: Tensor | None, temperature: float
) -> Tensor:
    own = _logits(rows, head).div(temperature).log_softmax(-1)
    with torch.no_grad():
        target = _logits(theirs, their_head).div(temperature).log_softmax(-1)
    return F.kl_div(own, target, reduction="none", log_target=True).sum(-1)


def _logits(rows: Tensor, head: Tensor | None) -> Tensor:
    return (rows if head is None else F.linear(rows, head.to(rows.dtype))).float()


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
