"""The length of a gradient, added in an order that no division of it changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_core.processes import Ranks, is_sharded, local_part

__all__ = ["steady_norm"]


@torch.no_grad()
def steady_norm(gradients: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The L2 norm of gradients, to the same bits whether they are whole or divided by rows.

    The squares of each row are added in halves, then those sums likewise: every addition is a sum
    of two tensors, so no kernel chooses an order.

    Args:
        gradients: strided; a divided one (`DTensor`) by its first dimension over all processes.
        ranks: this process among its peers; where a gradient is divided, all of them ask.
    """
    own = [_halved(_rows(local_part(gradient))) for gradient in gradients]
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


def _rows(gradient: Tensor) -> Tensor:
    """The squares, in rows `(first dimension, all others)`, float32 at least."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide.square().reshape(len(wide) if wide.ndim else 1, math.prod(wide.shape[1:]))


def _halved(values: Tensor) -> Tensor:
    """The sum of each row `(rows,)`: one half is added to the other until one number is left."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        both = values[:, :half] + values[:, half : 2 * half]
        if values.shape[1] % 2:
            both[:, 0] += values[:, -1]
        values = both
    return values.reshape(-1) if values.shape[1] else values.new_zeros(len(values))
