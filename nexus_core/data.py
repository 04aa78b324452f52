"""What batches are, how many rows and tokens they hold, and the stream of them that a run reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from nexus_core.errors import DataError
from nexus_core.intervals import Interval
from nexus_core.state import TrainState

__all__ = ["Batch", "Codec", "RunData", "Seekable", "batch_size", "to_device"]

Batch: TypeAlias = Any
"""What a loader yields: usually a dict of tensors, but any nesting of dicts, lists and tuples."""


class Codec(Protocol):
    """What turns the ids of a data set into something a person reads: a tokenizer."""

    @property
    def size(self) -> int: ...  # how many distinct ids there are
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class Seekable(Protocol):
    """Data that starts anywhere in an epoch without replaying what came before."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class RunData:
    """What `make_data` answers; `valid` goes by the prefix of its metrics: "val"."""

    train: Iterable[Batch]
    valid: Mapping[str, Iterable[Batch]] = field(default_factory=dict)
    codec: Codec | None = None


def stream_batches(data: Iterable[Batch], state: TrainState, horizon: Interval) -> Iterator[Batch]:
    """Batches from the cursor on, epoch after epoch, moving the cursor, until the horizon."""
    while not (horizon.unit == "epochs" and horizon.reached(state)):
        epoch = state.epoch
        for batch in _batches_from(data, epoch, state.batch):
            state.batch += 1
            if state.batch == state.epoch_length:
                state.epoch, state.batch = epoch + 1, 0
            yield batch
            if state.epoch > epoch or (horizon.unit == "epochs" and horizon.reached(state)):
                break
        else:
            read, state.epoch, state.batch = state.batch, epoch + 1, 0
            if read == 0 or (isinstance(data, Iterator) and not horizon.reached(state)):
                raise DataError(
                    f"the data ended after {read} batches, at step {state.step}, before "
                    f"{horizon}; pass data that can be read again, or an earlier horizon"
                )


def _batches_from(data: Iterable[Batch], epoch: int, start: int) -> Iterator[Batch]:
    """The batches of an epoch from `start` on: sought where the data can, else read past."""
    if isinstance(data, Seekable):
        return data.batches(epoch, start)
    return data if isinstance(data, Iterator) else islice(iter(data), start, None)


def batch_size(batch: Batch) -> tuple[int, int]:
    """The rows and the tokens of a batch: its first tensor's length, and its `input_ids`."""
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return len(batch["input_ids"]), batch["input_ids"].numel()
    while isinstance(batch, Mapping | list | tuple) and batch:
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    rows = len(batch) if isinstance(batch, Tensor) and batch.ndim else 1
    return rows, rows


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on the device; containers are new, so they may be changed."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
