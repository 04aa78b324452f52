"""Sum gradients over the cells of a step and over ranks, during the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_core import ConfigError, Step
from nexus_core.cells import CellSum, Node
from nexus_core.processes import Ranks, gather
from nexus_plugins._shared.cell_sums import (
    DENSE,
    Exchange,
    buckets,
    columns,
    empty,
    flat_rows,
    kind_of,
    sum_over_processes,
)
from nexus_plugins.ddp.bucket import Bucket
from nexus_plugins.ddp.course import Course, course_of

__all__ = ["CellGradients"]

SMALLEST = 2**22
"""Minimum bytes for a separate message."""


class CellGradients:
    """Sums gradients over cells and ranks during the backward pass.

    The first pass of each turn records the order in which gradients arrive; from then on a bucket
    is sent as soon as the last cell has completed it. The returned gradients are views of the
    buckets, and valid until the next pass.

    Args:
        named: the parameters, with names for error messages.
        ranks: this process's rank.
        bucket: maximum bucket size in bytes.
        ring: reduce as the backend does.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], ranks: Ranks, bucket: float, *, ring: bool
    ) -> None:
        self.parameters = [parameter for _, parameter in named]
        self._names = [name for name, _ in named]
        self._ranks, self._most, self._ring = ranks, bucket, ring
        self._buckets: dict[str | None, list[Bucket]] = {}  # by turn
        self._apart: dict[str | None, set[int]] = {}  # by turn: known gradients in no bucket
        self._courses: dict[tuple[int, ...], Course] = {}
        self._rooms: list[Tensor | None] = [None, None]
        self._present: list[Bucket] = []
        self._where: dict[int, tuple[Bucket, int]] = {}
        self._order: list[int] = []  # arrival order of gradients in no bucket
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
        """Whether these are its parameters, and the same ones are trained."""
        trained = [id(parameter) for parameter in parameters if parameter.requires_grad]
        return _are(self.parameters, parameters) and list(self._handles) == trained

    def is_of(self, part: CellSum) -> bool:
        """Whether this is a sum of their gradients and of losses."""
        return _are(self.parameters, part.like[:-1])

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles.values():
            handle.remove()

    @contextmanager
    def taking(self, step: Step, count: int) -> Iterator[None]:
        """Take the gradients of the step's current cell; after the last one, send everything.

        Args:
            step: the step that the cell belongs to.
            count: number of cells in a full batch.
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
        """The sum of gradients and losses over all cells.

        Args:
            part: this rank's part, without the gradients already taken.
            step: the step that the gradient belongs to.
            count: number of cells in a full batch.
        """
        if not self._present:
            whole = self._all_at_once(part, step, count)
            self._settle(step.turn, whole)
            return whole
        kinds = torch.tensor([max(map(kind_of, column), default=0) for column in columns(part)])
        for index, (bucket, place) in self._where.items():
            kinds[index] = max(int(kinds[index]), DENSE * bucket.reached[place])
        losses = self._send_rest(part, kinds)
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
        """Process a complete gradient."""
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
                f"ddp: the gradient of '{self._names[index]}' is computed twice per backward pass, "
                "unlike in the first step, and cannot be reduced during the backward pass; run "
                "every step like the first"
            )
        bucket.take(place)
        if bucket.is_done:
            self._send(self._present[:-1])

    def _send(self, buckets: Sequence[Bucket]) -> None:
        """Send the buckets that the last cell has completed, in an order that all ranks share."""
        while self._is_last and (number := len(self._sent)) < len(buckets):
            if not buckets[number].is_done:
                return
            self._begin_one(buckets[number].rows(), buckets[number].flat[0])

    def _begin_one(self, rows: dict[Node, Tensor], out: Tensor) -> None:
        """Start one exchange, and the second half of the one before it."""
        number, nodes = len(self._sent), [] if self._ring else self._course.nodes
        exchange = Exchange(rows, nodes, self._ranks, out, self._rooms[number % 2], number)
        exchange.begin()
        self._rooms[number % 2] = exchange.room
        if self._sent:
            self._sent[-1].middle()
        self._sent.append(exchange)

    def _send_rest(self, part: CellSum, kinds: Tensor) -> Tensor:
        """Send the last bucket, the losses and which gradients exist; wait for everything.

        If the gradients are those that the buckets were built from, the host needs no details: the
        sum says how many ranks have exactly these. Otherwise it would have to sync with the device.

        Args:
            part: the losses.
            kinds: kinds of the gradients on this rank; replaced by those of all ranks.

        Returns:
            The sum of the losses.
        """
        like, bucket = part.like[-1], self._present[-1]
        count, together, work = like.numel(), bucket.carries(like), None
        usual = torch.zeros_like(kinds)
        usual[[*self._where, -1]] = DENSE
        if together:
            bucket.add_rest(part, torch.equal(kinds, usual))
        if not (together and like.is_cpu):
            work = dist.all_reduce(kinds, dist.ReduceOp.MAX, async_op=True)
        self._send(self._present)
        if not together:
            rows = flat_rows(part, [len(part.like) - 1], self._ranks)
            self._begin_one(rows, empty(part.like[-1:], self._ranks))
        self._sent[-1].middle()
        for exchange in self._sent:
            exchange.end()
        if work is not None:
            work.wait()
        if not together:
            return self._sent[-1].out[:count]
        tail = bucket.tail(bucket.slot, count + 1).clone()
        if work is None and int(tail[count]) == sum(map(bool, self._course.nodes)):
            kinds.copy_(usual)
        elif work is None:
            dist.all_reduce(kinds, dist.ReduceOp.MAX)
        return tail[:count]

    def _all_at_once(self, part: CellSum, step: Step, count: int) -> list[Tensor | None]:
        return sum_over_processes(part, step, count, self._ranks, self._most, ring=self._ring)

    def _add_others(
        self, found: list[Tensor | None], others: list[int], part: CellSum, step: Step, count: int
    ) -> None:
        """Sum gradients that are in no bucket; if some are new, determine the order again."""
        if others:
            rest = CellSum(part.count, [part.like[index] for index in others])
            rest.parts = {n: [values[i] for i in others] for n, values in part.parts.items()}
            for index, value in zip(others, self._all_at_once(rest, step, count), strict=True):
                found[index] = value
        if not self._apart[step.turn].issuperset(others):
            del self._buckets[step.turn]

    def _settle(self, turn: str | None, whole: Sequence[Tensor | None]) -> None:
        """Assign the gradients of this pass to buckets, in arrival order."""
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
            Bucket(self.parameters, indices, self._ranks)
            for indices in buckets(self.parameters, order, most)
        ]
        self._apart[turn] = {i for i, value in enumerate(whole[:-1]) if value is not None} - {
            *order
        }


def _are(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether these are the same tensor objects."""
    return list(map(id, some)) == list(map(id, others))
