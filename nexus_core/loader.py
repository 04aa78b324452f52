"""Batches in an order that is a pure function of (seed, epoch, index), and what they consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from nexus_core.errors import ConfigError, DataError
from nexus_core.intervals import Interval
from nexus_core.ranks import Ranks
from nexus_core.state import TrainState

__all__ = [
    "Batch",
    "Codec",
    "ResumableLoader",
    "RunData",
    "Seekable",
    "batch_size",
    "epoch_length",
    "permute",
    "stream_batches",
    "to_device",
]

Batch: TypeAlias = Any
"""What a loader yields: usually a dict of tensors, but any nesting of dicts, lists and tuples."""

_ROUNDS = 8  # of the Feistel network
_SORTED_UP_TO = 4096


class Codec(Protocol):
    """What turns the ids of a data set into something a person reads: a tokenizer."""

    @property
    def size(self) -> int:
        """How many distinct ids there are."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""


@runtime_checkable
class Seekable(Protocol):
    """A loader that starts anywhere without replaying what came before."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the given one on."""


@dataclass(frozen=True)
class RunData:
    """What `make_data` answers.

    Args:
        train: the batches to train on: a `ResumableLoader`, or any iterable.
        valid: evaluation batches by the prefix of their metrics ("val").
        codec: the tokenizer, where there is one.
    """

    train: Iterable[Batch]
    valid: Mapping[str, Iterable[Batch]] = field(default_factory=dict)
    codec: Codec | None = None


class ResumableLoader:
    """Batches of a map-style data set, in an order that needs no replay.

    Where a sample comes in an epoch is computed from (seed, epoch) by a permutation in constant
    memory, so any step can be sought in constant time and the order is the same for any number of
    workers and processes. Batches that are dicts get `sample_ids`, the indices of their rows.

    Args:
        dataset: has `__len__` and `__getitem__` (and `__getitems__`, which is used if there).
            `dataset[i]` must depend on `i` alone.
        batch_size: rows of a batch, over all processes together.
        seed: of the order.
        shuffle: False gives the order of the data set (evaluation).
        drop_last: leave out a last batch that is not full.
        collate: makes a batch of a list of samples.
        num_workers: processes that read ahead; 0 reads in this one.
        prefetch: batches that each worker reads ahead.
        pin_memory: collate into page-locked memory, for fast copies to a CUDA device.
        ranks: this process among its peers; each takes its slice of every batch.

    Raises:
        DataError: the data set is empty, or has no full batch with `drop_last`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
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
        self.drop_last = drop_last
        self.ranks = ranks or Ranks()
        if batch_size < self.ranks.size:
            raise ConfigError(f"batch_size {batch_size} is less than {self.ranks.size} processes")
        if len(self) == 0:
            raise DataError(
                f"the data set has {len(dataset)} samples, too few for one batch of {batch_size}; "
                "add data or lower the batch size"
            )
        self._order = _Order(self)
        self._loader: DataLoader[Batch] = DataLoader(
            _Fetch(dataset, collate),
            batch_sampler=self._order,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # leaves the global generator alone
        )

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(epoch=0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number `start` on, at once."""
        self._order.epoch, self._order.start = epoch, start
        return iter(self._loader)

    def sample_ids(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """The indices into the data set that this process reads for a batch, in order."""
        first = batch * self.batch_size
        last = min(first + self.batch_size, len(self.dataset))
        places = np.arange(first, last, dtype=np.int64)
        share = np.array_split(places, self.ranks.size)[self.ranks.rank]
        return permute(share, len(self.dataset), self.seed, epoch) if self.shuffle else share


class _Order:
    """The batch sampler of the workers: index lists from wherever the loader has been sought to."""

    def __init__(self, loader: ResumableLoader) -> None:
        self._loader = loader
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self._loader) - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        for batch in range(self.start, len(self._loader)):
            yield self._loader.sample_ids(epoch, batch).tolist()


class _Fetch(Dataset[Batch]):
    """Reads the rows of a batch and collates them, in the worker."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> Batch:
        if hasattr(self._dataset, "__getitems__"):
            rows = self._dataset.__getitems__(indices)
        else:
            rows = [self._dataset[index] for index in indices]
        batch = self._collate(rows)
        if isinstance(batch, dict):
            batch["sample_ids"] = torch.tensor(indices)
        return batch


def permute(places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which sample stands at each place of an epoch's shuffled order, in constant memory.

    A few thousand samples are sorted by a keyed hash; more go through a Feistel network over the
    next power of two with cycle walking (Black and Rogaway 2002), a bijection on 0..size-1 for any
    size. Integer arithmetic alone: the same on every machine and for every version of numpy.

    Args:
        places: places in the order, each in 0..size-1.
        size: how many samples there are.
        seed: of the order.
        epoch: counts from 0; each epoch has an order of its own.

    Returns:
        Sample indices, as many as there are places.
    """
    keys = _round_keys(seed, epoch)
    if size <= _SORTED_UP_TO:
        order = np.argsort(_mix(np.arange(size, dtype=np.uint64) ^ keys[0]), kind="stable")
        return order[places].astype(np.int64)
    bits = (size - 1).bit_length()
    values = _feistel(places.astype(np.uint64), bits, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], bits, keys)
        outside = values >= size
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    mask = (1 << 64) - 1
    start = np.array([seed & mask], dtype=np.uint64)
    keyed = _mix(_mix(start) ^ np.array([epoch & mask], dtype=np.uint64))
    return _mix(keyed + np.arange(1, _ROUNDS + 1, dtype=np.uint64))


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left_bits, right_bits = bits // 2, bits - bits // 2
    for key in keys:
        left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
        mixed = left ^ (_mix(right ^ key) & np.uint64((1 << left_bits) - 1))
        values = (right << np.uint64(left_bits)) | mixed
        left_bits, right_bits = right_bits, left_bits
    return values


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit hangs on every bit."""
    with np.errstate(over="ignore"):
        values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def stream_batches(data: Iterable[Batch], state: TrainState, horizon: Interval) -> Iterator[Batch]:
    """Batches from the cursor on, epoch after epoch, moving the cursor, until the horizon.

    Raises:
        DataError: the data ends and cannot be read again.
    """
    epochs = horizon if horizon.unit == "epochs" else None
    while not (epochs and epochs.reached(state)):
        epoch = state.epoch
        for batch in _batches_from(data, epoch, state.batch):
            state.batch += 1
            if state.batch == state.epoch_length:
                state.next_epoch()
            yield batch
            if state.epoch > epoch or (epochs and epochs.reached(state)):
                break
        else:
            if state.batch == 0 or iter(data) is data:
                raise DataError(
                    f"the data ended after {state.batch} batches, at step {state.step}, before "
                    f"{horizon}; pass data that can be read again, or an earlier horizon"
                )
            state.next_epoch()


def _batches_from(data: Iterable[Batch], epoch: int, start: int) -> Iterator[Batch]:
    """The batches of an epoch from `start` on: sought where the data can, else read past."""
    if isinstance(data, Seekable):
        return data.batches(epoch, start)
    iterator = iter(data)
    return iterator if iterator is data else islice(iterator, start, None)


def epoch_length(data: Iterable[Batch]) -> int:
    """How many batches an epoch holds, 0 where the data does not say."""
    try:
        return len(data) if isinstance(data, Sized) else 0
    except TypeError:  # a DataLoader over an iterable data set has __len__ and no length
        return 0


def batch_size(batch: Batch) -> tuple[int, int]:
    """The rows and the tokens of a batch: its first tensor's length, and its `input_ids`."""
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor):
            return len(ids), ids.numel()
    rows = _rows(batch)
    return rows, rows


def _rows(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        return 1
    return next((_rows(part) for part in parts), 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on the device; containers are new, so they may be changed."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _as_it_is(batch: Batch) -> Batch:
    return batch
