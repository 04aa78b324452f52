"""The inputs of a step's gradient, in static device memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor

from nexus_core.batches import Batch, leaves, mapped
from nexus_plugins.compile.parts import PLAIN, fact, is_dense

if TYPE_CHECKING:
    from nexus_core import Step

__all__ = ["Inputs", "signature"]

Number: TypeAlias = Tensor | float


def signature(step: Step) -> tuple[object, ...]:
    """The kind of a step: its turn, and the structure, dtypes and shapes of each micro-batch."""
    named = [tuple(numbers) for numbers in (*step.counts, step.units, step.weights)]
    micro = [(one.share, one.borrowed, _kind(one.batch)) for one in step.micro]
    return (step.turn, *named, *micro)


def _kind(batch: Batch) -> object:
    """What a batch, or a part of it, has in common with others of its kind."""
    if is_dense(batch):
        return batch.shape, batch.dtype
    if type(batch) in PLAIN:
        return fact(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return type(batch), _kind(vars(batch))
    if isinstance(batch, Mapping):
        return type(batch), *((name, _kind(part)) for name, part in batch.items())
    if isinstance(batch, list | tuple):
        return type(batch), *map(_kind, batch)
    return type(batch)


class Inputs:
    """Static batches and scalars of one kind of step, on the device.

    Args:
        step: one of that kind.
        device: where they are stored.

    Attributes:
        refusal: why steps of this kind cannot be replayed; empty if they can.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._device, self.refusal = device, ""
        self._batches = [mapped(one.batch, self._room) for one in step.micro]
        numbers = (*step.counts, step.units, step.weights)
        self._numbers = [{name: self._number(n) for name, n in each.items()} for each in numbers]
        self._last: dict[int, float] = {}
        self._given: dict[int, Number] = {}
        for name, number in ((n, value) for each in numbers for n, value in each.items()):
            if isinstance(number, Tensor) and number.requires_grad:
                self.refusal = f"the weight of '{name}' is trained by the loss"

    def load(self, step: Step) -> None:
        """Copy a step's batches and scalars into static memory, without a sync."""
        if self.refusal:
            return
        for own, one in zip(self._batches, step.micro, strict=True):
            for room, leaf in zip(leaves(own), leaves(one.batch), strict=True):
                if isinstance(room, Tensor):
                    room.copy_(cast(Tensor, leaf), non_blocking=True)
        self._given.clear()
        given = (*step.counts, step.units, step.weights)
        for mine, numbers in zip(self._numbers, given, strict=True):
            for name, number in numbers.items():
                self._set(mine[name], number)

    @contextmanager
    def given_to(self, step: Step) -> Iterator[None]:
        """Let a step use the static inputs instead of its own, if they fit."""
        if self.refusal:
            yield
            return
        before = step.micro, step.counts, step.units, step.weights
        *counts, units, weights = self._numbers
        step.micro = tuple(
            one._replace(batch=own) for one, own in zip(step.micro, self._batches, strict=True)
        )
        step.counts, step.units, step.weights = tuple(counts), units, weights
        try:
            yield
        finally:
            step.micro, step.counts, step.units, step.weights = before

    def original(self, number: Number) -> Number:
        """The step's own value, if this is one of the static scalars."""
        return self._given.get(id(number), number)

    def _room(self, leaf: Batch) -> Batch:
        if is_dense(leaf):
            return torch.empty_like(leaf, device=self._device)
        if type(leaf) not in PLAIN:
            self.refusal = f"a batch holds a {type(leaf).__name__} that is not a plain tensor"
        return leaf

    def _number(self, number: Number) -> Tensor:
        on_device = isinstance(number, Tensor) and number.device == self._device
        dtype = number.dtype if on_device and isinstance(number, Tensor) else torch.float32
        return torch.zeros((), dtype=dtype, device=self._device)

    def _set(self, mine: Tensor, number: Number) -> None:
        self._given[id(mine)] = number
        if isinstance(number, Tensor) and not number.is_cpu:
            mine.copy_(number.detach().reshape(()))
            return
        value = float(number)
        if self._last.get(id(mine)) != value:
            self._last[id(mine)] = value
            mine.fill_(value)
