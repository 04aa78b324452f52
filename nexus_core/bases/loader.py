"""A data loader whose order is a pure function of seed, epoch and index."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias
from weakref import WeakMethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from nexus_core.bases.dealing import Dealing, deal, share
from nexus_core.bases.worker import attend, leaving, signals_held
from nexus_core.batches import Batch, digest, own_fingerprint
from nexus_core.cells import Cells, seed_for
from nexus_core.device import random_state, seed_everything, set_random_state
from nexus_core.errors import DataError
from nexus_core.processes import Ranks

__all__ = ["ResumableLoader", "permute"]

_ROUNDS = 8  # of the Feistel network
_WORD = (1 << 64) - 1
_READINGS = 4  # of a sample, to detect augmentation
_TOGETHER = 64  # batches permuted at once


class ResumableLoader:
    """Batches of a map-style data set, in an order that resumes without replay.

    The order is a permutation computed from seed and epoch, so seeking any step takes constant
    time, and the order is the same for any number of workers and processes. Batches that are dicts
    get `sample_ids`, the indices of their rows. If a batch has fewer rows than there are processes,
    some get a row without an index (`is_borrowed`), which the engine excludes from all sums.

    Args:
        dataset: has `__len__` and `__getitem__` (or `__getitems__`, for a list of indices);
            `dataset[i]` must depend on `i` only.
        batch_size: rows per batch, summed over all processes.
        seed: seed of the order.
        shuffle: False keeps the order of the data set (evaluation).
        order: maps positions to samples: (positions, samples, seed, epoch). It must be a pure
            function of these; None: each sample once per epoch.
        drop_last: drop the last batch if it is not full.
        collate: makes a batch from a list of samples.
        num_workers: worker processes, which prefetch `prefetch` batches each; 0 loads in the main
            process. Workers ignore SIGINT and SIGTERM, and exit with the main process.
        pin_memory: collate into page-locked memory, for fast copies to a CUDA device.
        ranks: this process's rank; each process gets its slice of every batch.

    Raises:
        DataError: there are too few samples for one batch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        order: Callable[[NDArray[np.int64], int, int, int], NDArray[np.int64]] | None = None,
        drop_last: bool = False,
        collate: Callable[[list[Any]], Batch] = default_collate,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._permute = order or permute
        self.drop_last = drop_last
        self.ranks = ranks or Ranks()
        self.cells = 0
        if len(self) == 0 or batch_size < self.ranks.size:
            raise DataError(
                f"{len(dataset)} samples are too few for a batch of {batch_size} in each of "
                f"{self.ranks.size} processes; add data or change batch_size"
            )
        self._fetch = _Fetch(dataset, collate)
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._idle: list[_Reader] = []

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(epoch=0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, starting at batch `start`, without reading earlier ones.

        Several iterators may be open at the same time, such as for training and for evaluation.
        """
        return self.batches_from_row(epoch, start * self.batch_size)

    def batches_from_row(self, epoch: int, row: int) -> Iterator[Batch]:
        """The batches of an epoch starting at a row, for resuming with another batch size."""
        order, loader = self._idle.pop() if self._idle else self._new_reader()
        order.lists, order.epoch, order.row = WeakMethod(self._sample_lists), epoch, row
        with signals_held():  # until the new workers have set up their signal handling
            batches = iter(loader)
        return self._read((order, loader), batches)

    def in_cells(self, count: int) -> ResumableLoader:
        """The same batches split into cells; each process gets whole cells, collated separately.

        Args:
            count: cells per batch, at most one per row. Random numbers drawn while reading a cell
                are the same in every process.
        """
        dealt = copy.copy(self)
        dealt.cells = count
        return dealt

    def is_borrowed(self, row: int) -> bool:
        """Whether this process has no row in the batch starting at `row`, and borrows one."""
        return self.ranks.rank >= min(self.batch_size, len(self.dataset) - row)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies this data in this order, independent of the batch size.

        Uses the data set's own `fingerprint` if it has one, else a digest of the first and last
        samples, unless these differ when read again, as with augmentation.
        """
        own = own_fingerprint(self.dataset)
        known = f"{own} {len(self.dataset)} {self.seed} {self.shuffle} {self._ends(own)}"
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def _ends(self, own: object) -> str:
        """A digest of the first and last samples; an empty digest if they vary.

        Each reading has its own seed: with the generators in their current state, a sample flipped
        half of the time would look constant in one process and not in the next.
        """
        if own is not None:
            return digest([])
        generators, found = random_state(), set[str]()
        for seed in range(_READINGS):
            seed_everything(seed)
            found.add(digest([self.dataset[0], self.dataset[len(self.dataset) - 1]]))
        set_random_state(generators)
        return found.pop() if len(found) == 1 else digest([])

    def _read(self, reader: _Reader, batches: Iterator[Batch | DataError]) -> Iterator[Batch]:
        try:
            yield from map(_batch_or_raise, batches)
        finally:
            self._idle.append(reader)  # keeps its workers for the next epoch

    def _new_reader(self) -> _Reader:
        order = _Order(WeakMethod(self._sample_lists), self.batch_size)
        dismissed = multiprocessing.Event()
        loader: DataLoader[Batch | DataError] = DataLoader(
            self._fetch,
            batch_sampler=order,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            persistent_workers=self._num_workers > 0,
            pin_memory=self._pin_memory,
            worker_init_fn=partial(attend, dismissed) if self._num_workers else None,
            generator=torch.Generator(),  # leaves the global generator alone
        )
        leaving(loader, dismissed)
        return order, loader

    def sample_ids(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """The data set indices that this process reads for a batch, in order."""
        return self._ids_of(epoch, range(batch, batch + 1))[0]

    def _sample_lists(self, epoch: int, row: int) -> Sequence[list[int] | Dealing]:
        """The samples of several batches starting at a row; empty after the last."""
        rest = len(self.dataset) - row
        count = rest // self.batch_size if self.drop_last else -(-rest // self.batch_size)
        batches = range(min(count, _TOGETHER))
        found = self._ids_of(epoch, batches, row) if batches else []
        lists: list[list[int]] = [ids.tolist() for ids in found]
        if not self.cells:
            return lists
        starts = [row + batch * self.batch_size for batch in batches]
        return [
            deal((self.seed, epoch, start), ids, self._rows(start), self.cells, self.ranks)
            for start, ids in zip(starts, lists, strict=True)
        ]

    def _rows(self, start: int) -> int:
        """The number of rows in the batch that starts at a row."""
        return max(0, min(self.batch_size, len(self.dataset) - start))

    def _ids_of(self, epoch: int, batches: range, row: int = 0) -> list[NDArray[np.int64]]:
        """`sample_ids` of several batches starting at a row; together they cost little more."""
        starts = [row + batch * self.batch_size for batch in batches]
        bounds = [share(self._rows(start), self.cells, self.ranks) for start in starts]
        shares = [
            np.arange(start + own[0], start + own[-1], dtype=np.int64)
            for start, own in zip(starts, bounds, strict=True)
        ]
        ids = np.concatenate(shares)
        if self.shuffle:
            ids = self._permute(ids, len(self.dataset), self.seed, epoch)
        return np.split(ids, np.cumsum([len(share) for share in shares])[:-1])


@dataclass
class _Order:
    """A batch sampler with a settable start.

    It holds its loader weakly: workers in a reference cycle are terminated late, by force. The
    reference is renewed for each iteration, since the garbage collector clears weak references to
    objects it finds in a cycle, even if a reader is reused afterwards.
    """

    lists: WeakMethod[Callable[[int, int], Sequence[list[int] | Dealing]]]
    batch_size: int
    epoch: int = 0
    row: int = 0

    def __iter__(self) -> Iterator[Any]:
        epoch, row = self.epoch, self.row
        while some := self._some(epoch, row):
            yield from some
            row += len(some) * self.batch_size

    def _some(self, epoch: int, row: int) -> Sequence[list[int] | Dealing]:
        lists = self.lists()
        return lists(epoch, row) if lists is not None else []


@dataclass
class _Fetch(Dataset[Batch]):
    """Reads the rows of a batch and collates them, in the worker.

    A data error is returned as a value: if raised, its message would become the worker's
    traceback.
    """

    dataset: Any
    collate: Callable[[list[Any]], Batch]

    def __getitems__(self, wanted: list[int] | Dealing) -> Batch | DataError:
        try:
            return self._cells(wanted) if isinstance(wanted, Dealing) else self._batch(wanted)
        except DataError as error:
            return error

    def _cells(self, wanted: Dealing) -> Cells:
        batches: list[Batch] = []
        for cell, ids in enumerate(wanted.ids, wanted.first):
            seed_for(*wanted.place, cell)
            batches.append(self._batch(ids))
        return Cells(tuple(batches), tuple(map(len, wanted.ids)), wanted.first, wanted.of)

    def _batch(self, indices: list[int]) -> Batch:
        wanted = indices or [0]  # an empty share borrows a row, which is excluded from all sums
        if hasattr(self.dataset, "__getitems__"):
            rows = self.dataset.__getitems__(wanted)
        else:
            rows = [self.dataset[index] for index in wanted]
        batch = self.collate(rows)
        if isinstance(batch, dict):
            batch["sample_ids"] = torch.tensor(indices, dtype=torch.int64)
        return batch


def permute(places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The sample, in 0..size-1, at each position of an epoch's order; uses constant memory.

    A Feistel network over the next power of two with cycle walking (Black and Rogaway 2002): a
    bijection for any size in integer arithmetic, so the same on every machine.
    """
    keys, bits = _round_keys(seed, epoch), max(2, (size - 1).bit_length())
    values = _feistel(places.astype(np.uint64), bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], bits, keys)
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    words = np.array([seed & _WORD, epoch & _WORD], dtype=np.uint64)
    keyed = _mix(_mix(words[:1]) ^ words[1:])
    return _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) + keyed)


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left_bits, right_bits = bits // 2, bits - bits // 2
    for key in keys:
        left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
        mixed = left ^ (_mix(right ^ key) & np.uint64((1 << left_bits) - 1))
        values = (right << np.uint64(left_bits)) | mixed
        left_bits, right_bits = right_bits, left_bits
    return values


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _as_it_is(batch: Batch | DataError) -> Batch | DataError:
    return batch


_Reader: TypeAlias = tuple[_Order, DataLoader[Batch | DataError]]


def _batch_or_raise(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise copy.copy(batch)  # whose traceback holds this frame: no cycle with the workers
    return batch
