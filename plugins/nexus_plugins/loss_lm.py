"""The language-model loss: cross-entropy of the next token, without the full logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus_core import DataError, Loss, LossConfig, hookimpl
from nexus_plugins._shared.alignment import check_alignment
from nexus_plugins._shared.linear_cross_entropy import linear_cross_entropy
from nexus_plugins._shared.outputs import rows_of

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["LossLmConfig", "LossLmPlugin"]


class LossLmConfig(LossConfig):
    """Settings of the language-model loss."""

    label_smoothing: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the target spread over all tokens; training only",
    )
    ignore_index: int = Field(default=-100, description="label of ignored positions")


class LossLmPlugin(Loss[LossLmConfig]):
    """Trains on the cross-entropy, in nats, of `labels` `(B, T)` aligned with `input_ids`.

    The model returns logits `(B, T, V)`, a dict or an object with `logits` or with `hidden` and
    `head_weight` (full logits then never exist), or a tuple that starts with one of these.
    Evaluation is without smoothing and also reports perplexity and, for batches with
    `label_bytes`, bits per byte.
    """

    config_class = LossLmConfig
    _is_aligned = False
    linear_cross_entropy = staticmethod(linear_cross_entropy)

    def units(self, batch: Batch) -> Tensor:
        """The number of labels that are not ignored.

        Raises:
            DataError: the labels of the first batch equal its ids, unshifted.
        """
        if not self._is_aligned:
            check_alignment(batch, self.config.ignore_index)
            self._is_aligned = True
        return cast(Tensor, (batch["labels"] != self.config.ignore_index).sum())

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The smoothed cross-entropy summed over labels, in nats."""
        return self._cross_entropy(output, batch["labels"], self.config.label_smoothing)

    def validation_loss(self, batch: Batch, output: Any) -> Tensor:
        """The plain cross-entropy summed over labels, in nats."""
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
        rows, head = rows_of(output)
        if labels.shape != rows.shape[:-1]:
            raise DataError(
                f"labels have shape {tuple(labels.shape)}, but the model's output is for "
                f"{tuple(rows.shape[:-1])}; expected one label per position of input_ids"
            )
        rows, labels, ignore = rows.flatten(0, -2), labels.flatten(), self.config.ignore_index
        if head is not None:
            return self.linear_cross_entropy(rows, head, labels, smoothing, ignore)
        if torch.are_deterministic_algorithms_enabled():
            return _in_one_order(rows.float().log_softmax(-1), labels, smoothing, ignore)
        return F.cross_entropy(
            rows.float(), labels, ignore_index=ignore, label_smoothing=smoothing, reduction="sum"
        )


def _in_one_order(logs: Tensor, labels: Tensor, smoothing: float, ignore: int) -> Tensor:
    """The same sum without `NLLLoss`, which PyTorch lists as not deterministic on CUDA."""
    counted = labels != ignore
    picked = logs.gather(1, labels.where(counted, 0).unsqueeze(1)).squeeze(1)
    nats = -(1 - smoothing) * picked - smoothing * logs.mean(-1)
    return nats.where(counted, 0).sum()
