"""A gradient norm, summed in an order that does not depend on sharding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_core.processes import Ranks, is_sharded, local_part

__all__ = ["steady_norm"]

AT_ONCE = {"cpu": 1 << 18}
"""Numbers squared and added at once: on the host, as many as fit in the cache."""
AT_ONCE_ELSEWHERE = 1 << 24


@torch.no_grad()
def steady_norm(gradients: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The L2 norm of gradients, bitwise identical whether they are whole or sharded by rows.

    The squares of each row are added by repeated halving, then those sums likewise. Every addition
    is elementwise, so the order does not depend on a kernel.

    Args:
        gradients: strided tensors; a `DTensor` must be sharded by its first dimension over all
            ranks.
        ranks: this process's rank; if a gradient is sharded, every rank must call this.
    """
    own = _sums_of_rows([local_part(gradient) for gradient in gradients])
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


def _sums_of_rows(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The sums of squares of the rows of each gradient `(first dimension,)`, float32 at least.

    Rows of equal width are summed together, also of different gradients: a small model has many
    gradients, and a call costs more than the arithmetic.
    """
    alike: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    rows = [g.reshape(len(g) if g.ndim else 1, math.prod(g.shape[1:])) for g in gradients]
    for place, one in enumerate(rows):
        alike.setdefault((one.device, one.dtype, one.shape[1]), []).append(place)
    found: list[Tensor] = [*gradients]
    for (device, dtype, width), places in alike.items():
        count = max(1, AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE) // max(1, width))
        wide = torch.promote_types(dtype, torch.float32)
        blocks = _blocks([rows[place] for place in places], count)
        room = torch.empty(
            min(count, sum(len(rows[place]) for place in places)), width, dtype=wide, device=device
        )
        sums = torch.cat([_halved(_squares(some, room)).flatten().clone() for some in blocks])
        counts = [len(rows[place]) for place in places]
        for place, part in zip(places, torch.split(sums, counts), strict=True):
            found[place] = part
    return found


def _squares(rows: Sequence[Tensor], room: Tensor) -> Tensor:
    """The squares of some rows, in reused memory."""
    found = room[: sum(map(len, rows))]
    for part, one in zip(torch.split(found, [*map(len, rows)]), rows, strict=True):
        part.copy_(one)
    return found.square_()


def _blocks(matrices: Sequence[Tensor], count: int) -> Iterator[list[Tensor]]:
    """All rows of some matrices in order, in chunks."""
    block, room = list[Tensor](), count
    for matrix in matrices:
        for some in torch.tensor_split(matrix, [*range(room, len(matrix), count)]):
            block.append(some)
            room -= len(some)
            if room == 0:
                yield block
                block, room = [], count
    if block:
        yield block


def _halved(values: Tensor) -> Tensor:
    """Sum each row in place, adding one half to the other until one number is left."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        both = values[:, :half].add_(values[:, half : 2 * half])
        if values.shape[1] % 2:
            both[:, 0] += values[:, -1]
        values = both
    return values if values.shape[1] else values.new_zeros(len(values), 1)
