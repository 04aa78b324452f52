"""Unit-weighted means that stay on the device until somebody reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nexus_core.errors import ConfigError
from nexus_core.processes import Ranks, gather

__all__ = ["Measured", "Meter"]

Number = Tensor | float
Finish = Callable[[float], float] | None


class Measured(Protocol):
    """A metric that keeps its own record, as those of torchmetrics do; its owner updates it."""

    def compute(self) -> Any: ...
    def reset(self) -> Any: ...


@dataclass
class _Entry:
    """One metric: the sums that have been read, and what still lies on the device."""

    total: float = 0.0
    units: float = 0.0
    finish: Finish = None
    pending: list[tuple[Number, Number]] = field(default_factory=list)
    measured: Measured | None = None

    def compute(self) -> None:
        """Take the value of a metric that keeps its own record, which begins anew."""
        if self.measured is not None:
            self.total, self.units = float(self.measured.compute()), 1.0
            self.measured.reset()

    def mean(self) -> float:
        mean = self.total / self.units
        try:
            return self.finish(mean) if self.finish else mean
        except OverflowError:
            return float("inf")


class Meter:
    """Collects sums and units by name; reading all of them costs one transfer.

    Attributes:
        counts: whether what is added now does; False for rows that another process has as well.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._said: set[str] = set()
        self.counts = True

    def add(
        self, name: str, value: Number | Measured, units: Number = 1.0, finish: Finish = None
    ) -> None:
        """Add a sum over units, numbers or tensors of one element; nothing waits for the device.

        A metric that keeps its own record is noted, and computed when all are read.
        """
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry()
        entry.finish = finish
        if not isinstance(value, Tensor) and hasattr(value, "compute"):
            entry.measured = cast(Measured, value)
            return
        both = _plain(name, value), _plain(name, units)
        entry.pending.append(both if self.counts else (0.0, 0.0))

    def mark(self) -> dict[str, int]:
        """Where the record is now, for `rollback`; nothing may be read in between."""
        return {name: len(entry.pending) for name, entry in self._entries.items()}

    def rollback(self, mark: Mapping[str, int]) -> None:
        """Forget what was added since the mark."""
        self.counts = True
        for name in list(self._entries):
            if name in mark:
                del self._entries[name].pending[mark[name] :]
            else:
                del self._entries[name]

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The mean of every metric since the last reading, over all processes."""
        self._settle()
        entries, self._entries = self._entries, {}
        for name in sorted(entries):  # in one order, as some of them ask their peers
            entries[name].compute()
        if ranks.size > 1:
            known = gather(ranks, sorted(entries))
            names = sorted({name for own in known for name in own})
            self._say_partial(names, known, ranks)
            entries = {name: entries.get(name, _Entry()) for name in names}
            sums = [[entries[name].total, entries[name].units] for name in names]
            reduced = ranks.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
            for name, (total, units) in zip(names, reduced, strict=True):
                entries[name].total, entries[name].units = total, units
        return {name: entry.mean() for name, entry in entries.items() if entry.units}

    def _say_partial(self, names: list[str], known: list[list[str]], ranks: Ranks) -> None:
        """Name a metric that some processes alone have; its mean is over those."""
        new = [n for n in names if not all(n in own for own in known) and n not in self._said]
        self._said.update(new)
        if new and ranks.is_main:
            who = [str(rank) for rank, own in enumerate(known) if new[0] in own]
            warnings.warn(
                f"the metric '{new[0]}' is logged by rank {' and '.join(who)} alone, and is the "
                "mean over what is there; log it everywhere, with 0 units where there is nothing",
                RuntimeWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, list[float]]:
        """The sums and units since the last reading, by name."""
        self._settle()
        return {name: [entry.total, entry.units] for name, entry in self._entries.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on from sums that `state_dict` gave."""
        known = {name: entry.finish for name, entry in self._entries.items()}
        self._entries = {
            name: _Entry(total, units, known.get(name)) for name, (total, units) in state.items()
        }

    def _settle(self) -> None:
        """Bring all that is pending to the host at once, and add it up in double precision."""
        pending = [pair for entry in self._entries.values() for pair in entry.pending]
        read = iter(_to_host([n for pair in pending for n in pair if isinstance(n, Tensor)]))
        for entry in self._entries.values():
            for value, units in entry.pending:
                entry.total += next(read) if isinstance(value, Tensor) else value
                entry.units += next(read) if isinstance(units, Tensor) else units
            entry.pending.clear()


def _plain(name: str, number: Number | Measured) -> Number:
    """The number without its graph.

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
    """The numbers in their order; those of a device come in one transfer."""
    if all(tensor.is_cpu for tensor in tensors):
        return [float(tensor.item()) for tensor in tensors]  # exact, and quicker than stacking
    device = next(t.device for t in tensors if not t.is_cpu)
    flat = [t.detach().reshape(()).to(device, torch.float32) for t in tensors if not t.is_cpu]
    read = iter(torch.stack(flat).tolist())
    return [float(t.item()) if t.is_cpu else next(read) for t in tensors]
