"""The language-model loss: cross-entropy of the next token, without the full logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_core import DataError, Loss, LossConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.loader import Batch

__all__ = ["LossLmConfig", "LossLmPlugin", "linear_cross_entropy"]

LOGITS_AT_ONCE = 2**25  # a matrix product that is large enough to be fast
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
        return cast(Tensor, (batch["labels"] != self.config.ignore_index).sum())

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
        nats, units = self.validation_loss(batch, output), self.units(batch)
        engine.log("loss", nats, units=units)
        engine.log("perplexity", nats, units=units, finish=math.exp)
        if "label_bytes" in batch:
            engine.log("bits_per_byte", nats / math.log(2), units=batch["label_bytes"].sum())
        return {self.term: nats}

    def _cross_entropy(self, output: Any, labels: Tensor, smoothing: float) -> Tensor:
        output = output[0] if isinstance(output, tuple) else output
        fused = hasattr(output, "hidden") and hasattr(output, "head_weight")
        rows: Any = output.hidden if fused else getattr(output, "logits", output)
        if labels.shape != rows.shape[:-1]:
            raise DataError(
                f"labels have shape {tuple(labels.shape)}, the model's output is for "
                f"{tuple(rows.shape[:-1])}; expected one label per position of input_ids"
            )
        rows, labels, ignore = rows.flatten(0, -2), labels.flatten(), self.config.ignore_index
        if fused:
            return linear_cross_entropy(rows, output.head_weight, labels, smoothing, ignore)
        return F.cross_entropy(
            rows.float(), labels, ignore_index=ignore, label_smoothing=smoothing, reduction="sum"
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T, ..., reduction="sum")`, a few rows of logits at a time.

    `hidden` is `(n, D)`, `weight` `(V, D)`, `labels` `(n,)`; 0 nats if no row counts.
    Source: Hsu et al. 2024, "Liger Kernel": the gradients are made in the forward pass, while the
        logits are at hand. Here the smoothing's terms, of rank one, never touch the logits.
    """
    counted = labels != ignore_index
    if not bool(counted.all()):
        hidden, labels = hidden[counted], labels[counted]
    inputs = (hidden, weight, labels, label_smoothing, torch.is_grad_enabled())
    return cast(Tensor, _LinearCrossEntropy.apply(*inputs))  # type: ignore[no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, train: bool
    ) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        narrow = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            rows, head = hidden.to(narrow), weight.to(narrow)
            share = smoothing / len(weight)
            spread_head, spread_hidden = (v.sum(0, dtype=wide) * share for v in (weight, hidden))
            total = -(hidden.to(wide) @ spread_head).sum()
            grad_hidden = torch.empty_like(hidden if train else hidden[:0])
            grad_weight = -spread_hidden.repeat(len(weight) if train else 0, 1)
            size = max(1, LOGITS_AT_ONCE // len(weight))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                logits = rows[part] @ head.T
                total += _to_gradient(logits, labels[part], 1 - smoothing)
                if train:
                    grad_hidden[part] = logits @ head - spread_head
                    grad_weight += logits.T @ rows[part]
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None


def _to_gradient(logits: Tensor, labels: Tensor, confidence: float) -> Tensor:
    """Replace logits by `softmax - confidence * one_hot`, their gradient; return their loss."""
    picked = logits.gather(1, labels.unsqueeze(1))
    total = -confidence * picked.sum(dtype=torch.promote_types(logits.dtype, torch.float32))
    for block in torch.split(logits, max(1, LOGITS_IN_CACHE // logits.shape[1])):
        wide = block.to(total.dtype)
        probabilities = wide.softmax(-1)
        # The likeliest class's probability is at least 1/V: its logarithm is always exact.
        total += (wide.amax(-1) - probabilities.amax(-1).log()).sum()
        block.copy_(probabilities)
    logits[torch.arange(len(labels), device=labels.device), labels] -= confidence
    return total
