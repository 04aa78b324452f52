"""The length of a gradient, added in an order that no division of it changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_core.processes import Ranks, is_sharded, local_part

__all__ = ["steady_norm"]

CACHED = 1 << 18
"""Numbers that are squared and added at once on the host."""
NARROW = 64
"""Numbers of a row that are left when rows are put together again."""


@torch.no_grad()
def steady_norm(gradients: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The L2 norm of gradients, to the same bits whether they are whole or divided by rows.

    The squares of each row are added in halves, then those sums likewise: every addition is a sum
    of two tensors, so no kernel chooses an order.

    Args:
        gradients: strided; a divided one (`DTensor`) by its first dimension over all processes.
        ranks: this process among its peers; where a gradient is divided, all of them ask.
    """
    own = [_sums_of_rows(local_part(gradient)) for gradient in gradients]
    divided = [place for place, gradient in enumerate(gradients) if is_sharded(gradient)]
    if divided and ranks.size > 1:
        rows = [len(gradients[place]) for place in divided]
        sizes = [-(-count // ranks.size) for count in rows]
        sent = torch.zeros(sum(sizes), device=own[divided[0]].device)
        for place, room in zip(divided, torch.split(sent, sizes), strict=True):
            room[: len(own[place])] = own[place]
        found = sent.new_empty(ranks.size, len(sent))
        dist.all_gather(list(found), sent)
        for place, part, count in zip(divided, torch.split(found, sizes, 1), rows, strict=True):
            own[place] = part.reshape(-1)[:count]
    device = own[0].device if own else None
    sums = torch.cat([part.to(device) for part in own]) if own else torch.zeros(1)
    return _halved(sums.view(1, -1)).reshape(()).sqrt()


def _sums_of_rows(gradient: Tensor) -> Tensor:
    """The sum of squares of each row `(first dimension,)`, float32 at least.

    On the host some rows are taken at a time, as many as stay in the cache.
    """
    rows = gradient.reshape(len(gradient) if gradient.ndim else 1, math.prod(gradient.shape[1:]))
    wide = torch.promote_types(rows.dtype, torch.float32)
    count = max(1, CACHED // max(1, rows.shape[1])) if rows.is_cpu else max(1, len(rows))
    parts = [_halved(some.to(wide).square(), NARROW) for some in torch.split(rows, count)]
    return _halved(torch.cat(parts)).reshape(-1)


def _halved(values: Tensor, width: int = 1) -> Tensor:
    """Rows, written over: one half is added to the other until they are no wider than this."""
    while values.shape[1] > width:
        half = values.shape[1] // 2
        both = values[:, :half].add_(values[:, half : 2 * half])
        if values.shape[1] % 2:
            both[:, 0] += values[:, -1]
        values = both
    return values if values.shape[1] else values.new_zeros(len(values), 1)
