"""Pairs of answers: join them for one pass, and take the results apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_core import DataError

if TYPE_CHECKING:
    from nexus_core.batches import Batch

__all__ = ["SIDES", "Pairs", "check_answers", "join", "margins"]

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pairs:
    """The result of a pass over pairs: log-probabilities of answers, `(B,)` each, in nats."""

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor


def check_answers(labels: Tensor, name: str, ignore_index: int) -> None:
    """Reject pairs without an answer, if the labels `(B, T)` are on the host.

    Raises:
        DataError: all labels of a row are ignored.
    """
    if labels.is_cpu and len(empty := (labels == ignore_index).all(1).nonzero()):
        raise DataError(
            f"{name} of row {int(empty[0])} of a batch are all {ignore_index}: no answer; "
            "remove the pair"
        )


def margins(pairs: Pairs) -> Tensor:
    """How much more the chosen answers gained on the reference than the rejected ones, `(B,)`."""
    chosen = pairs.chosen - pairs.chosen_reference
    return chosen - (pairs.rejected - pairs.rejected_reference)


def join(batch: Batch, ignore_index: int) -> dict[str, Tensor]:
    """Join both answers of all pairs into one batch, `(2B, T)`, chosen ones first."""
    width = max(batch[f"{side}_input_ids"].shape[1] for side in SIDES)
    fill = {"input_ids": 0, "labels": ignore_index, "attention_mask": 0}
    joined = {}
    for name, value in fill.items():
        parts = [batch.get(f"{side}_{name}") for side in SIDES]
        if name == "attention_mask":
            shapes = [batch[f"{side}_input_ids"] for side in SIDES]
            pairs = zip(parts, shapes, strict=True)
            parts = [torch.ones_like(ids) if mask is None else mask for mask, ids in pairs]
        joined[name] = torch.cat([F.pad(p, (0, width - p.shape[1]), value=value) for p in parts])
    return joined
