"""Check that labels are next tokens, as language-model losses expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_core.errors import DataError

if TYPE_CHECKING:
    from nexus_core.batches import Batch

__all__ = ["check_alignment"]


def check_alignment(batch: Batch, ignore_index: int, prefix: str = "") -> None:
    """Reject labels that equal the ids: a model would learn to copy its input.

    Hugging Face models take such labels and shift them; the losses here do not.

    Args:
        batch: has `labels`, and usually `input_ids` of the same shape.
        ignore_index: label of ignored positions.
        prefix: prefix of both names.

    Raises:
        DataError: there are no labels, or every label that is not ignored equals the id at its own
            position instead of the next one.
    """
    if (labels := batch.get(f"{prefix}labels")) is None:
        raise DataError(
            f"the batch has no '{prefix}labels', only {', '.join(sorted(batch))}; use a data "
            "plugin that provides them, or remove this loss"
        )
    ids = batch.get(f"{prefix}input_ids")
    if ids is None or ids.shape != labels.shape:
        return
    counted = labels != ignore_index
    copied = counted.any() and bool((labels == ids)[counted].all())
    if copied and not bool((labels[..., :-1] == ids[..., 1:])[counted[..., :-1]].all()):
        raise DataError(
            f"{prefix}labels equal {prefix}input_ids position by position, as Hugging Face models "
            "expect; here labels[:, t] is the token after position t: shift them by one, "
            "labels[:, :-1] = input_ids[:, 1:], with -100 at the end"
        )
