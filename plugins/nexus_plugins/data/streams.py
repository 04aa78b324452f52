"""Batches of iterable-style datasets and generators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, cast

from nexus_core.batches import Batch
from nexus_core.processes import Ranks

__all__ = ["Called", "StatefulStream", "Stream"]


class Called:
    """Batches of a generator function, which is called once per epoch."""

    def __init__(self, make: Callable[[], Iterator[Batch]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Batch]:
        return self._make()


class Stream:
    """Batches of an iterable-style dataset.

    Args:
        dataset: yields the samples of an epoch, each time it is iterated.
        batch_size: samples per batch, over all ranks.
        collate: makes a batch from samples.
        ranks: this process's rank; each rank takes its slice of every batch. A last batch with
            fewer samples than ranks is dropped.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        batch_size: int,
        collate: Callable[[list[Any]], Batch],
        ranks: Ranks,
    ) -> None:
        self.dataset = dataset
        self._size, self._collate, self._ranks = batch_size, collate, ranks

    def __iter__(self) -> Iterator[Batch]:
        samples = iter(self.dataset)
        while len(rows := list(islice(samples, self._size))) >= self._ranks.size:
            yield self._collate(rows[self._ranks.rank :: self._ranks.size])


class StatefulStream(Stream):
    """The same for a stateful dataset, which saves its own position."""

    def state_dict(self) -> Any:
        return cast(Any, self.dataset).state_dict()

    def load_state_dict(self, state: Any) -> None:
        cast(Any, self.dataset).load_state_dict(state)
