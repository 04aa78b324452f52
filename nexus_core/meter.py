"""Unit-weighted means that stay on the device until they are read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nexus_core.errors import ConfigError
from nexus_core.processes import Ranks, gather

__all__ = ["Measured", "Meter", "added"]

Number = Tensor | float
Finish = Callable[[float], float] | None


class Measured(Protocol):
    """A metric with its own state, as in torchmetrics; its owner updates it."""

    def compute(self) -> Any: ...
    def reset(self) -> Any: ...


@dataclass
class _Entry:
    """One metric: the sums read so far, and what is still on the device."""

    total: list[float] = field(default_factory=list)  # exact partial sums
    units: list[float] = field(default_factory=list)
    finish: Finish = None
    pending: list[tuple[Number, Number]] = field(default_factory=list)
    measured: list[tuple[Measured, float]] = field(default_factory=list)  # one at most, of 1 unit

    def compute(self) -> None:
        """Compute and reset a metric with its own state."""
        for measured, units in self.measured:
            self.total, self.units = [float(measured.compute())], [units]
            measured.reset()

    def sums(self) -> list[float]:
        """The parts of sum and units, alternating."""
        pairs = zip_longest(self.total or [0.0], self.units or [0.0], fillvalue=0.0)
        return [number for pair in pairs for number in pair]

    def mean(self) -> float:
        mean = math.fsum(self.total) / math.fsum(self.units)
        try:
            return self.finish(mean) if self.finish else mean
        except OverflowError:
            return float("inf")


class Meter:
    """Collects sums and units by name; reading all of them costs one transfer.

    Sums are exact until they are read, so that they do not depend on who added what.

    Args:
        counts: whether added values count; False for values that another rank adds as well.
    """

    def __init__(self, counts: bool = True) -> None:
        self._entries: dict[str, _Entry] = {}
        self._said: set[str] = set()
        self.counts = counts

    def add(
        self, name: str, value: Number | Measured, units: Number = 1.0, finish: Finish = None
    ) -> None:
        """Add a sum over units, as numbers or one-element tensors; does not sync with the device.

        A metric with its own state is registered, and computed when all are read.
        """
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry()
        entry.finish = finish
        if not isinstance(value, Tensor) and hasattr(value, "compute"):
            entry.measured = [(cast(Measured, value), 1.0)]
            return
        both = _plain(name, value), _plain(name, units)
        entry.pending.append(both if self.counts else (0.0, 0.0))

    @contextmanager
    def counting(self, counts: bool) -> Iterator[None]:
        """Set whether values added inside count: a cell counts wherever it is computed."""
        before, self.counts = self.counts, counts
        try:
            yield
        finally:
            self.counts = before

    def mark(self) -> dict[str, int]:
        """The current mark, for `rollback`; nothing may be read in between."""
        return {name: len(entry.pending) for name, entry in self._entries.items()}

    def rollback(
        self, mark: Mapping[str, int]
    ) -> list[tuple[str, Number | Measured, Number, Finish]]:
        """Drop what was added since the mark, and return it: the arguments of `add`.

        Of metrics with their own state, all are returned, and the new ones dropped.
        """
        forgotten = [
            (name, value, units, entry.finish)
            for name, entry in self._entries.items()
            for value, units in (*entry.pending[mark.get(name, 0) :], *entry.measured)
        ]
        for name in list(self._entries):
            if name in mark:
                del self._entries[name].pending[mark[name] :]
            else:
                del self._entries[name]
        return forgotten

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The mean of every metric since the last read, over all ranks."""
        self._settle()
        entries, self._entries = self._entries, {}
        for name in sorted(entries):  # in a fixed order, as some communicate with other ranks
            entries[name].compute()
        if ranks.size > 1:
            known = gather(ranks, {name: entry.sums() for name, entry in entries.items()})
            names = sorted({name for own in known for name in own})
            self._say_partial(names, known, ranks)
            finish = {name: entry.finish for name, entry in entries.items()}
            summed = added(known)
            entries = {n: _Entry(*_parts(summed[n]), finish.get(n)) for n in names}
        return {name: entry.mean() for name, entry in entries.items() if any(entry.units)}

    def _say_partial(
        self, names: list[str], known: Sequence[Collection[str]], ranks: Ranks
    ) -> None:
        """Warn about a metric that only some ranks log; its mean is over those."""
        new = [n for n in names if not all(n in own for own in known) and n not in self._said]
        self._said.update(new)
        if new and ranks.is_main:
            who = [str(rank) for rank, own in enumerate(known) if new[0] in own]
            warnings.warn(
                f"the metric '{new[0]}' is only logged by rank {' and '.join(who)}, and is the "
                "mean over those; log it on every rank, with 0 units if there is nothing",
                RuntimeWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, list[float]]:
        """The sums and units since the last read, by name.

        They alternate in a list; several of each are the parts of a sum that one float cannot hold.
        """
        self._settle()
        return {name: entry.sums() for name, entry in self._entries.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue from the sums of `state_dict`."""
        known = {name: entry.finish for name, entry in self._entries.items()}
        self._entries = {
            name: _Entry(*_parts(sums), known.get(name)) for name, sums in state.items()
        }

    def _settle(self) -> None:
        """Transfer everything pending to the CPU at once, and add it in double precision."""
        pending = [pair for entry in self._entries.values() for pair in entry.pending]
        read = iter(_to_host([n for pair in pending for n in pair if isinstance(n, Tensor)]))
        for entry in self._entries.values():
            total, units = entry.total, entry.units
            for value, count in entry.pending:
                total.append(next(read) if isinstance(value, Tensor) else value)
                units.append(next(read) if isinstance(count, Tensor) else count)
            entry.total, entry.units = exact(total), exact(units)
            entry.pending.clear()


def exact(values: Sequence[float]) -> list[float]:
    """The exact sum as a list of floats, the largest first; empty if it is 0."""
    parts = list[float]()
    try:
        while left := math.fsum([*values, *(-part for part in parts)]):
            if not math.isfinite(left):
                return [left]
            parts.append(left)
    except (ValueError, OverflowError):  # inf - inf, or float overflow
        return [sum(values)]
    return parts


def added(known: Iterable[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The sums of several records of `Meter.state_dict`, exactly."""
    found: dict[str, _Entry] = {}
    for name, (total, units) in ((n, _parts(s)) for one in known for n, s in one.items()):
        entry = found.setdefault(name, _Entry())
        entry.total, entry.units = exact([*entry.total, *total]), exact([*entry.units, *units])
    return {name: entry.sums() for name, entry in found.items()}


def _parts(sums: Sequence[float]) -> tuple[list[float], list[float]]:
    return list(sums[::2]), list(sums[1::2])


def _plain(name: str, number: Number | Measured) -> Number:
    """The number, detached from its graph.

    Raises:
        ConfigError: it is more than one number.
    """
    if not isinstance(number, Tensor):
        return cast(float, number)
    if number.numel() != 1:
        raise ConfigError(
            f"the metric '{name}' is a tensor of shape {tuple(number.shape)}; log one number, for "
            "instance its sum with units=its numel()"
        )
    return number.detach() if number.requires_grad else number


def _to_host(tensors: list[Tensor]) -> list[float]:
    """The numbers in order; one transfer per device."""
    if all(tensor.is_cpu for tensor in tensors):
        return [float(tensor.item()) for tensor in tensors]  # exact, and faster than stacking
    device = next(t.device for t in tensors if not t.is_cpu)
    flat = [t.detach().reshape(()).to(device, torch.float32) for t in tensors if not t.is_cpu]
    read = iter(torch.stack(flat).tolist())
    return [float(t.item()) if t.is_cpu else next(read) for t in tensors]
