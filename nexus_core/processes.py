"""Ranks of a distributed run: sums over ranks, and what they agree on after a step."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Agreement", "Ranks", "gather", "is_sharded", "local_part", "whole"]

Value = TypeVar("Value")
SHORT = 2048
"""Bytes gathered in the first exchange."""
HEED_EVERY = 8
"""Evaluation batches between two exchanges of ranks: milliseconds, in seconds of work."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank in the job; rank 0 owns run folder, console and loggers."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """From `torch.distributed`; a single process if it is not initialized."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which owns what exists once per run."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks; the tensor itself in a single process."""
        if self.size > 1:
            tensor = tensor.detach().clone()
            dist.all_reduce(tensor)
        return tensor


class Agreement:
    """What all ranks agree on: how much was read, the time, and whether to stop.

    `begin` sends this rank's part, `end` receives the total; the exchange overlaps with the weight
    update. A single process sends nothing.

    Attributes:
        reason: why all ranks stop; None: they do not.
        at_once: the stop does not wait for an evaluation.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.reason: str | None = None
        self._ranks = ranks
        self.at_once = False
        self._wish: str | None = None  # this rank's reason to stop
        self._hurry = False  # whether to stop at once
        self._own = 0, 0
        self._sums: Tensor
        self._work: dist.Work | None = None
        self._now = 0.0

    def close(self) -> None:
        """The loop has ended; forget requests to stop."""
        self._wish, self._hurry, self.at_once = None, False, False

    def stop(self, reason: str, at_once: bool = False) -> None:
        """Request a stop from this rank."""
        self._wish, self._hurry = reason, at_once or self._hurry
        if self._ranks.size == 1:
            self.reason, self.at_once = reason, self._hurry

    def settle(self, busy: bool = False) -> bool:
        """Exchange stop requests outside a step, including those from before the loop.

        Args:
            busy: this rank will take part in another such exchange.

        Returns:
            Whether any rank will.
        """
        self.begin(int(busy))
        return self.end()[0] > 0

    def heed(self, number: int | None) -> bool:
        """Whether to stop at once; called between two batches of an evaluation.

        Ranks exchange their requests now and then, and get the same answer at the same batch; one
        with fewer batches takes part until all are done.

        Args:
            number: index of the next batch; None: all are read.
        """
        if self._ranks.size > 1 and (number is None or number % HEED_EVERY == 0):
            while self.settle(number is not None) and number is None and not self.at_once:
                pass
        return self.at_once

    def begin(self, rows: int = 0, tokens: int = 0) -> None:
        """Send this rank's rows and tokens since the last call, and its stop request."""
        self._own = rows, tokens
        if self._ranks.size > 1:
            now = time.perf_counter() if self._ranks.is_main else 0.0
            own = [rows, tokens, now, self._wish is not None, self._hurry]
            self._sums = torch.tensor(own, dtype=torch.double)
            self._work = dist.all_reduce(self._sums, async_op=True)

    def end(self) -> tuple[int, int]:
        """Rows and tokens of all ranks; the stop reason is that of the first rank with one."""
        if self._work is None:
            self.reason, self.at_once = self._wish, self._hurry
            return self._own
        self._work.wait()
        self._work = None  # it keeps the group's connections
        rows, tokens, self._now, stops, hurry = self._sums.tolist()
        wishes = gather(self._ranks, self._wish) if stops else []
        self.reason, self.at_once = next(filter(None, wishes), None), bool(hurry)
        return int(rows), int(tokens)

    def clock(self) -> float:
        """Seconds; with several ranks those of rank 0 at the last exchange."""
        return time.perf_counter() if self._ranks.size == 1 else self._now


def gather(ranks: Ranks, value: Value) -> list[Value]:
    """Gather each rank's value on all ranks; every rank must call it.

    Short values take one exchange, others three: latency matters more than bytes.

    Args:
        ranks: this process's rank.
        value: anything that can be pickled; it is only sent to ranks of this run.
    """
    found = [value] * ranks.size
    if ranks.size > 1:
        text = pickle.dumps(value).ljust(SHORT, b"\0")
        sent = torch.frombuffer(bytearray(text if len(text) == SHORT else SHORT), dtype=torch.uint8)
        parts = list(sent.new_empty(ranks.size, SHORT))
        dist.all_gather(parts, sent)
        if all(part[0] for part in parts):  # pickles never start with 0, and end themselves
            return [pickle.loads(part.numpy()) for part in parts]
        dist.all_gather_object(found, value)
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a `DTensor`, of which this rank may hold only a shard."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without a copy: all of it, unless it is a `DTensor`."""
    return cast(Tensor, getattr(tensor, "to_local", lambda: tensor)())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is a `DTensor`; then every rank must call it."""
    return cast(Tensor, getattr(tensor, "full_tensor", lambda: tensor)())
