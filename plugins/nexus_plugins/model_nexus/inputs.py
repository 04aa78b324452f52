"""Check the model's inputs, and find where documents begin."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_shapes", "document_numbers"]


def check_shapes(input_ids: Tensor, segment_ids: Tensor | None) -> None:
    """Check that tokens are `(B, T)`, and segment ids have the same shape.

    Raises:
        ValueError: they are not.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, time), both at "
            f"least 1. For a single sequence: input_ids[None]."
        )
    if segment_ids is not None and segment_ids.shape != input_ids.shape:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}; expected that of input_ids, "
            f"{tuple(input_ids.shape)}: one document number per token."
        )


def document_numbers(segment_ids: Tensor) -> Tensor:
    """Number the documents, so that a segment id that recurs later is a new document."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return F.pad(changes, (1, 0)).cumsum(1)
