"""Buckets: gradients that are summed and sent as one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nexus_core.cells import CellSum, Node
from nexus_core.processes import Ranks
from nexus_plugins._shared.cell_sums import NOTHING, padded
from nexus_plugins.ddp.course import Course, Move

__all__ = ["Bucket"]

TAIL = 64
"""Elements that a bucket reserves after the gradients."""
AT_ONCE = 2**20
"""Bytes of gradients added in one call; limited so that their memory is reused."""
ALIGNED = 16
"""Elements: each gradient starts at a multiple of this."""


class Bucket:
    """A group of parameters whose gradients are sent together.

    Args:
        parameters: the model's parameters.
        indices: indices of the bucket's parameters.
        ranks: the ranks of the run.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], indices: Sequence[int], ranks: Ranks
    ) -> None:
        self.indices = indices
        self.parameters = parameters = [parameters[index] for index in indices]
        starts, end = [], 0
        for parameter in parameters:
            starts.append(end)
            end += -(-parameter.numel() // ALIGNED) * ALIGNED
        self._starts, self._end, self._size = starts, end, padded(end + TAIL, ranks)
        self.flat: list[Tensor] = []  # one per slot
        self.views: list[list[Tensor]] = []

    @property
    def slot(self) -> int:
        """The slot of the sum over all ranks."""
        return self._course.rows[min(self._course.rows)] if self._course.rows else 0

    def rows(self) -> dict[Node, Tensor]:
        """The sum of each complete subtree."""
        return {node: self.flat[slot] for node, slot in self._course.rows.items()}

    def carries(self, values: Tensor) -> bool:
        """Whether such values fit after the gradients."""
        flat = self.flat[0]
        alike = values.dtype == flat.dtype and values.device == flat.device
        return alike and values.numel() < TAIL

    def add_rest(self, part: CellSum, is_usual: bool) -> None:
        """Append the losses, and a flag summed to the number of ranks with the usual gradients."""
        count, first = part.like[-1].numel(), self.slot
        for node, slot in self._course.rows.items():
            losses = part.parts[node][-1]
            tail = self.tail(slot, count + 1)
            tail[:count] = NOTHING if losses is None else losses
            tail[count] = float(is_usual and slot == first)

    def tail(self, slot: int, count: int) -> Tensor:
        """The first values after the gradients."""
        return self.flat[slot][self._end : self._end + count]

    def begin(self, course: Course) -> None:
        """Start a step."""
        self._course, self.reached = course, [False] * len(self.parameters)
        like = self.parameters[0]
        while len(self.flat) < course.slots:
            flat = torch.zeros(self._size, dtype=like.dtype, device=like.device)
            self.flat.append(flat)
            self.views.append([
                torch.as_strided(flat, p.shape, torch.empty_like(p, device="meta").stride(), at)
                for p, at in zip(self.parameters, self._starts, strict=True)
            ])  # fmt: skip

    def open(self, move: Move | None) -> None:
        """Start a cell; None: its gradient does not count."""
        self.move, self.arrived = move, [False] * len(self.parameters)
        self.left = sum(parameter.requires_grad for parameter in self.parameters)
        self._waiting: list[int] = []
        self._bytes, self.is_done = 0, False

    def take(self, place: int) -> None:
        """Add the gradient of a parameter."""
        self.arrived[place] = True
        self.left -= 1
        self._waiting.append(place)
        self._bytes += self.parameters[place].nbytes
        if self._bytes >= AT_ONCE:
            self._add()
        if not self.left:
            self.close()

    @torch.no_grad()
    def close(self) -> None:
        """Finish the cell: add the subtrees that it completes."""
        if self.is_done:
            return
        self._add()
        self.is_done = True
        if self.move is None:
            return
        self.reached = [a or b for a, b in zip(self.reached, self.arrived, strict=True)]
        if self.move.is_first:
            for view, there in zip(self.views[self.move.slot], self.arrived, strict=True):
                if not there:
                    view.fill_(NOTHING)
        for left, right in self.move.merges:
            self.flat[left] += self.flat[right]

    @torch.no_grad()
    def _add(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        pairs = [(place, self.parameters[place].grad) for place in waiting]
        for place in waiting:
            self.parameters[place].grad = None
        if self.move is None or not pairs:
            return
        views = [self.views[self.move.slot][place] for place, _ in pairs]
        values = [g.to_dense() if g.is_sparse else g for _, g in pairs if g is not None]
        add = torch._foreach_copy_ if self.move.is_first else torch._foreach_add_
        add(views, values)
