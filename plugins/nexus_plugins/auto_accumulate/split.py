"""Split batches into parts of nearly equal size."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from itertools import pairwise
from typing import TypeGuard

from torch import Tensor

from nexus_core.batches import Batch, batch_size

__all__ = ["Rows", "first_rows", "is_splittable", "parts"]

Rows = MutableMapping[str, object]
"""A batch that can be split: a dict whose tensors have one entry per row."""


def is_splittable(batch: Batch) -> TypeGuard[Rows]:
    """Whether it is a dict, so that parts can replace it."""
    return isinstance(batch, MutableMapping)


def parts(batch: Rows, rows: int) -> list[dict[str, object]]:
    """Split the batch into as few nearly equal parts of at most `rows` rows as possible.

    Tensors and lists with an entry per row are split, as views; anything else is in every part.
    """
    total = batch_size(batch)[0]
    if total <= rows:
        return [dict(batch)]
    count = math.ceil(total / rows)
    bounds = [total * part // count for part in range(count + 1)]
    return [_rows(batch, total, *between) for between in pairwise(bounds)]


def first_rows(batch: Rows, rows: int) -> dict[str, object]:
    """The first rows of a batch, as views."""
    return _rows(batch, batch_size(batch)[0], 0, rows)


def _rows(batch: Rows, total: int, low: int, high: int) -> dict[str, object]:
    return {name: _cut(value, total, low, high) for name, value in batch.items()}


def _cut(value: object, total: int, low: int, high: int) -> object:
    if isinstance(value, Tensor):
        return value[low:high] if value.ndim and len(value) == total else value
    if isinstance(value, dict):
        return {name: _cut(item, total, low, high) for name, item in value.items()}
    return value[low:high] if isinstance(value, list) and len(value) == total else value
