"""Gradients that are summed over the cells of a step, and over processes, while they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_core import ConfigError, Step
from nexus_core.cells import CellSum, Node, owned
from nexus_core.processes import Ranks, gather
from nexus_plugins._shared.cell_sums import (
    DENSE,
    NOTHING,
    Exchange,
    Nodes,
    buckets,
    columns,
    empty,
    flat_rows,
    kind_of,
    nodes_of,
    padded,
    sum_over_processes,
)

__all__ = ["CellGradients", "Course", "Move", "course_of"]

SMALLEST = 2**22
"""Bytes that are worth a message of their own."""
TAIL = 64
"""Numbers that a bucket has room for behind the gradients."""
AT_ONCE = 2**20
"""Bytes of gradients that are added in one call: not more, so that their memory is used again."""
ALIGNED = 16
"""Numbers: each gradient begins at a multiple of them."""


@dataclass(frozen=True)
class Move:
    """What becomes of a cell's gradient.

    Args:
        slot: that it is added to.
        is_first: nothing is in there yet.
        merges: slots that are then added up, the second to the first.
    """

    slot: int
    is_first: bool
    merges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Course:
    """How a process adds up its cells in the order of the tree, in few slots.

    Args:
        moves: of its cells.
        rows: in the end, the slot of each whole subtree.
        slots: how many are needed.
        nodes: the subtrees of all processes.
    """

    moves: dict[int, Move]
    rows: dict[Node, int]
    slots: int
    nodes: Nodes


def course_of(of: Sequence[int], count: int, ranks: Ranks) -> Course:
    """The course of a step.

    Args:
        of: how many cells each of its batches has.
        count: how many a whole batch has.
        ranks: this process among its peers.
    """
    cells, parts, free, used = sum(of), dict[Node, int](), list[int](), 0
    moves = {}
    for cell in owned(of, count, ranks.rank, ranks.size):
        level, place, merges = 0, cell, list[tuple[int, int]]()
        slot = parts.pop((0, cell - 1), None) if cell % 2 else None
        is_first = slot is None
        if slot is None:
            slot = free.pop() if free else used
            used = max(used, slot + 1)
        else:
            level, place = 1, cell // 2
        first = slot
        while 1 << level < cells:
            left, is_alone = (level, place - 1), place + 1 << level >= cells
            if place % 2 and left in parts:
                other = parts.pop(left)
                merges.append((other, slot))
                free.append(slot)
                slot = other
            elif place % 2 or not is_alone:
                break
            level, place = level + 1, place // 2
        parts[level, place] = slot
        moves[cell] = Move(first, is_first, tuple(merges))
    return Course(moves, parts, max(used, 1), nodes_of(of, count, ranks.size))


class _Bucket:
    """Some of the parameters, whose gradients are sent together."""

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
        self.flat: list[Tensor] = []  # of each slot
        self.views: list[list[Tensor]] = []

    @property
    def slot(self) -> int:
        """Where the sum over all processes is."""
        return self._course.rows[min(self._course.rows)] if self._course.rows else 0

    def rows(self) -> dict[Node, Tensor]:
        """The sum of each whole subtree."""
        return {node: self.flat[slot] for node, slot in self._course.rows.items()}

    def add_losses(self, part: CellSum) -> bool:
        """Have the sum of the losses travel with it; False: they are of another kind, or many."""
        like, flat = part.like[-1], self.flat[0]
        if like.dtype != flat.dtype or like.device != flat.device or like.numel() > TAIL:
            return False
        for node, slot in self._course.rows.items():
            if (losses := part.parts[node][-1]) is not None:
                self.tail(slot, like.numel()).copy_(losses)
        return True

    def tail(self, slot: int, count: int) -> Tensor:
        """The first numbers behind the gradients."""
        return self.flat[slot][self._end : self._end + count]

    def begin(self, course: Course) -> None:
        """Begin a step."""
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
        """Begin a cell; None: one whose gradient does not count."""
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
        """The gradients of the cell are there: add what it completes."""
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


class CellGradients:
    """Sums gradients over cells and processes while the backward pass makes them.

    In the first pass of each turn it sees which gradients come in which order; from then on a
    bucket of them is sent as soon as the last cell has completed it. The gradients that it gives
    are views of the buckets, and hold until the next pass.

    Args:
        named: the parameters, with names for errors.
        ranks: this process among its peers.
        bucket: bytes that are sent at once at most.
        ring: add as the backend does.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], ranks: Ranks, bucket: float, *, ring: bool
    ) -> None:
        self.parameters = [parameter for _, parameter in named]
        self._names = [name for name, _ in named]
        self._ranks, self._most, self._ring = ranks, bucket, ring
        self._buckets: dict[str | None, list[_Bucket]] = {}  # of each turn
        self._apart: dict[str | None, set[int]] = {}  # what is not in them, and known
        self._courses: dict[tuple[int, ...], Course] = {}
        self._rooms: list[Tensor | None] = [None, None]
        self._present: list[_Bucket] = []
        self._where: dict[int, tuple[_Bucket, int]] = {}
        self._order: list[int] = []  # in which those came that are in no bucket
        self._twice: set[int] = set()
        self._sent: list[Exchange] = []
        self._is_open = self._is_last = False
        self._handles = {
            id(parameter): parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._arrived, i)
            )
            for i, parameter in enumerate(self.parameters)
            if parameter.requires_grad
        }

    def is_for(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are the parameters, and the same of them are trained."""
        trained = [id(parameter) for parameter in parameters if parameter.requires_grad]
        return _are(self.parameters, parameters) and list(self._handles) == trained

    def is_of(self, part: CellSum) -> bool:
        """Whether this is a sum of their gradients, and of losses."""
        return _are(self.parameters, part.like[:-1])

    def close(self) -> None:
        """Leave the parameters alone."""
        for handle in self._handles.values():
            handle.remove()

    @contextmanager
    def taking(self, step: Step, count: int) -> Iterator[None]:
        """Take the gradients of the step's present cell; with the last one, send all.

        Args:
            step: whose cell it is.
            count: cells of a whole batch.
        """
        if step.place == 0:
            self._begin(step, count)
        micro, self._is_last = step.micro[step.place], step.is_last
        counts = micro.cell is not None and not micro.borrowed
        for bucket in self._present:
            bucket.open(self._course.moves[micro.cell or 0] if counts else None)
        self._is_open, self._order = True, []
        try:
            yield
        finally:
            self._is_open = False
        for bucket in self._present:
            bucket.close()
        self._send(self._present[:-1])

    @torch.no_grad()
    def total(self, part: CellSum, step: Step, count: int) -> list[Tensor | None]:
        """The sum over all cells of the gradients and of the losses.

        Args:
            part: what this process has of it that was not taken.
            step: whose gradient it is.
            count: cells of a whole batch.
        """
        if not self._present:
            whole = self._all_at_once(part, step, count)
            self._settle(step.turn, whole)
            return whole
        kinds = torch.tensor([max(map(kind_of, column), default=0) for column in columns(part)])
        for index, (bucket, place) in self._where.items():
            kinds[index] = max(int(kinds[index]), DENSE * bucket.reached[place])
        work = dist.all_reduce(kinds, dist.ReduceOp.MAX, async_op=True)
        losses = self._send_rest(part)
        if work is not None:
            work.wait()
        reached = [index for index, kind in enumerate(kinds.tolist()) if kind]
        found: list[Tensor | None] = [None] * len(part.like)
        found[-1] = losses
        for index in reached:
            if index in self._where:
                bucket, place = self._where[index]
                found[index] = bucket.views[bucket.slot][place]
        self._add_others(
            found, [i for i in reached[:-1] if i not in self._where], part, step, count
        )
        return found

    def _begin(self, step: Step, count: int) -> None:
        if step.cells not in self._courses:
            self._courses[step.cells] = course_of(step.cells, count, self._ranks)
        self._course = self._courses[step.cells]
        self._present = self._buckets.get(step.turn, [])
        self._where = {
            index: (bucket, place)
            for bucket in self._present
            for place, index in enumerate(bucket.indices)
        }
        self._twice, self._sent = set(), []
        for bucket in self._present:
            bucket.begin(self._course)

    def _arrived(self, index: int, _: Tensor) -> None:
        """A gradient is complete."""
        if not self._is_open:
            return
        if index not in self._where:
            if index in self._order:
                self._twice.add(index)
            self._order.append(index)
            return
        bucket, place = self._where[index]
        if bucket.arrived[place]:
            raise ConfigError(
                f"ddp: the gradient of '{self._names[index]}' is made twice in one backward pass, "
                "which it was not in the first step, and cannot be summed while it is made; run "
                "the step as the first one was"
            )
        bucket.take(place)
        if bucket.is_done:
            self._send(self._present[:-1])

    def _send(self, buckets: Sequence[_Bucket]) -> None:
        """Send those that the last cell has completed, in order, the same in all processes."""
        while self._is_last and (number := len(self._sent)) < len(buckets):
            if not buckets[number].is_done:
                return
            self._begin_one(buckets[number].rows(), buckets[number].flat[0])

    def _begin_one(self, rows: dict[Node, Tensor], out: Tensor) -> None:
        """Begin to send something, after which what was sent before is on its way back."""
        number, nodes = len(self._sent), [] if self._ring else self._course.nodes
        exchange = Exchange(rows, nodes, self._ranks, out, self._rooms[number % 2], number)
        exchange.begin()
        self._rooms[number % 2] = exchange.room
        if self._sent:
            self._sent[-1].middle()
        self._sent.append(exchange)

    def _send_rest(self, part: CellSum) -> Tensor:
        """Send the last bucket with the losses, and wait for all; returns the losses' sum."""
        count, bucket = part.like[-1].numel(), self._present[-1]
        together = bucket.add_losses(part)
        self._send(self._present)
        if not together:
            rows = flat_rows(part, [len(part.like) - 1], self._ranks)
            self._begin_one(rows, empty(part.like[-1:], self._ranks))
        self._sent[-1].middle()
        for exchange in self._sent:
            exchange.end()
        return bucket.tail(bucket.slot, count).clone() if together else self._sent[-1].out[:count]

    def _all_at_once(self, part: CellSum, step: Step, count: int) -> list[Tensor | None]:
        return sum_over_processes(part, step, count, self._ranks, self._most, ring=self._ring)

    def _add_others(
        self, found: list[Tensor | None], others: list[int], part: CellSum, step: Step, count: int
    ) -> None:
        """Sum what is not in buckets; where it is new, look again for the order of all."""
        if others:
            rest = CellSum(part.count, [part.like[index] for index in others])
            rest.parts = {n: [values[i] for i in others] for n, values in part.parts.items()}
            for index, value in zip(others, self._all_at_once(rest, step, count), strict=True):
                found[index] = value
        if not self._apart[step.turn].issuperset(others):
            del self._buckets[step.turn]

    def _settle(self, turn: str | None, whole: Sequence[Tensor | None]) -> None:
        """Make buckets of what the pass has reached, in the order in which it came."""
        seen = gather(self._ranks, (self._order, self._twice))
        twice = {index for _, some in seen for index in some}
        dense = {
            index
            for index, value in enumerate(whole[:-1])
            if value is not None and not value.is_sparse and index not in twice
        }
        order = [i for i in dict.fromkeys(i for order, _ in seen for i in order) if i in dense]
        size = sum(self.parameters[index].nbytes for index in order)
        most = min(self._most, max(SMALLEST, size / 4))
        self._buckets[turn] = [
            _Bucket(self.parameters, indices, self._ranks)
            for indices in buckets(self.parameters, order, most)
        ]
        self._apart[turn] = {i for i, value in enumerate(whole[:-1]) if value is not None} - {
            *order
        }


def _are(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether these are the very tensors."""
    return list(map(id, some)) == list(map(id, others))
