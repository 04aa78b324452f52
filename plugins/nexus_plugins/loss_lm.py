"""The language-model loss: cross-entropy of the next token, without the full logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_core.errors import DataError
from nexus_core.plugin import Loss, LossConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.loader import Batch

__all__ = ["LossLmConfig", "LossLmPlugin", "linear_cross_entropy"]

LOGITS_AT_ONCE = 2**24  # one matrix product's worth: large enough to be fast, small beside a batch
LOGITS_IN_CACHE = 2**20  # the softmax goes over its input several times


class LossLmConfig(LossConfig):
    """Settings of the language-model loss."""

    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="part of the target spread over all tokens; training only"
    )
    ignore_index: int = Field(-100, description="label of positions that do not count")


class LossLmPlugin(Loss[LossLmConfig]):
    """Trains on the cross-entropy, in nats, of `labels` `(B, T)` aligned with `input_ids`.

    The model's output may offer `hidden` and `head_weight` (full logits then never exist),
    offer `logits`, be logits, or be a tuple that starts with logits. Evaluation is without
    smoothing and also reports perplexity and, for batches with `label_bytes`, bits per byte.
    """

    def units(self, batch: Batch) -> Tensor:
        """The number of labels that count."""
        count: Tensor = (batch["labels"] != self.config.ignore_index).sum()
        return count

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The smoothed cross-entropy summed over the labels that count, in nats."""
        return self._cross_entropy(output, batch["labels"], self.config.label_smoothing)

    def validation_loss(self, batch: Batch, output: Any) -> Tensor:
        """The plain cross-entropy summed over the labels that count, in nats."""
        return self._cross_entropy(output, batch["labels"], 0.0)

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        """The term `lm`; in evaluation also `loss`, `perplexity` and `bits_per_byte`."""
        if engine.training:
            return {self.term: self.loss(batch, output)}
        nats = self.validation_loss(batch, output)
        units = self.units(batch)
        engine.log("loss", nats, units=units)
        engine.log("perplexity", nats, units=units, finish=math.exp)
        if "label_bytes" in batch:
            engine.log("bits_per_byte", nats / math.log(2), units=batch["label_bytes"].sum())
        return {self.term: nats}

    def _cross_entropy(self, output: Any, labels: Tensor, smoothing: float) -> Tensor:
        ignore = self.config.ignore_index
        if hasattr(output, "hidden") and hasattr(output, "head_weight"):
            _check_labels(labels, output.hidden)
            hidden, weight = output.hidden.flatten(0, -2), output.head_weight
            return linear_cross_entropy(hidden, weight, labels.flatten(), smoothing, ignore)
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
        _check_labels(labels, logits)
        return F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=ignore,
            label_smoothing=smoothing,
            reduction="sum",
        )


def _check_labels(labels: Tensor, output: Tensor) -> None:
    if labels.shape != output.shape[:-1]:
        raise DataError(
            f"labels have shape {tuple(labels.shape)}, but the model's output is for "
            f"{tuple(output.shape[:-1])}; expected one label per position, aligned with input_ids"
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T`, summed, with a few rows of logits at a time.

    The gradients are made in the forward pass, while the logits are at hand, so that logits are
    computed once and none are kept. Equal to `F.cross_entropy(..., reduction="sum")`.

    Args:
        hidden: `(n, D)`.
        weight: `(V, D)`.
        labels: `(n,)` class numbers.
        label_smoothing: part of the target spread evenly over all V classes.
        ignore_index: rows with this label do not count.

    Returns:
        The sum in nats, float32; 0 if no row counts.

    Source: gradients in the forward pass as in Hsu et al. 2024, "Liger Kernel"; here the terms
        of the smoothing are of rank one and never touch the logits.
    """
    counted = labels != ignore_index
    if not bool(counted.all()):
        hidden, labels = hidden[counted], labels[counted]
    keep_graph = torch.is_grad_enabled()
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing, keep_graph)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, grad: bool
    ) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        narrow = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        with torch.autocast(device, enabled=False):
            rows, head = hidden.to(narrow), weight.to(narrow)
            wide = torch.promote_types(hidden.dtype, torch.float32)
            # Spread over all classes: this part of the target has the same row for every token.
            share = smoothing / len(weight)
            spread_head = weight.sum(0, dtype=wide) * share
            spread_hidden = hidden.sum(0, dtype=wide) * share
            total = -(hidden.to(wide) @ spread_head).sum()
            grad_hidden = torch.empty_like(hidden) if grad else None
            grad_weight = -spread_hidden.expand(weight.shape).contiguous() if grad else None
            size = max(1, LOGITS_AT_ONCE // len(weight))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                logits = rows[part] @ head.T
                total += _to_gradient(logits, labels[part], 1 - smoothing)
                if grad:
                    grad_hidden[part] = logits @ head - spread_head
                    grad_weight += logits.T @ rows[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None


def _to_gradient(logits: Tensor, labels: Tensor, confidence: float) -> Tensor:
    """Replace logits by the gradient `softmax - confidence * one_hot`; return their loss."""
    picked = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    total = -confidence * picked.sum(dtype=torch.promote_types(logits.dtype, torch.float32))
    for block in logits.split(max(1, LOGITS_IN_CACHE // logits.shape[1])):
        wide = block.to(total.dtype)
        probabilities = wide.softmax(-1)
        # The likeliest class's probability is at least 1/V: its logarithm is always exact.
        total += (wide.amax(-1) - probabilities.amax(-1).log()).sum()
        block.copy_(probabilities)
    logits[torch.arange(len(labels)), labels] -= confidence
    return total
