"""Unit-weighted means that stay on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nexus_core.ranks import Ranks

__all__ = ["Meter"]


@dataclass
class _Entry:
    """One metric: what has been read so far, and what still lies on the device."""

    total: float = 0.0
    units: float = 0.0
    finish: Callable[[float], float] | None = None
    pending: list[tuple[Tensor | float, Tensor | float]] = field(default_factory=list)


class Meter:
    """Collects sums and units per name; reading costs one transfer for all of them together."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def add(
        self,
        name: str,
        value: Tensor | float,
        units: Tensor | float = 1.0,
        finish: Callable[[float], float] | None = None,
    ) -> None:
        """Add a sum over units; nothing is computed and no device is waited for.

        Args:
            name: of the metric.
            value: the sum, a number or a tensor of one element, without graph.
            units: how many units the sum runs over.
            finish: applied to the mean when it is read (`math.exp` makes a perplexity).
        """
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry()
        entry.finish = finish
        entry.pending.append((value, units))

    def read(self, ranks: Ranks | None = None) -> dict[str, float]:
        """The mean of every metric since the last reading, which starts anew."""
        self._settle()
        entries, self._entries = self._entries, {}
        if ranks is not None and ranks.size > 1:
            _reduce(entries, ranks)
        return {name: _mean(entry) for name, entry in entries.items() if entry.units}

    def state_dict(self) -> dict[str, list[float]]:
        """The sums so far, so that a resumed run logs the same means."""
        self._settle()
        return {name: [entry.total, entry.units] for name, entry in self._entries.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take back what `state_dict` gave."""
        self._entries = {name: _Entry(total, units) for name, (total, units) in state.items()}

    def _settle(self) -> None:
        """Bring all pending values to the host at once, and add them up in double precision."""
        values = [
            number
            for entry in self._entries.values()
            for pair in entry.pending
            for number in pair
            if isinstance(number, Tensor)
        ]
        read = iter(_to_host(values))
        for entry in self._entries.values():
            for value, units in entry.pending:
                entry.total += next(read) if isinstance(value, Tensor) else value
                entry.units += next(read) if isinstance(units, Tensor) else units
            entry.pending.clear()


def _to_host(values: list[Tensor]) -> list[float]:
    """One transfer for all tensors that lie on one device (several only with CPU offload)."""
    if not values:
        return []
    target = next((value.device for value in values if value.device.type != "cpu"), None)
    flat = [value.detach().reshape(()).to(target, torch.float32) for value in values]
    numbers: list[float] = torch.stack(flat).tolist()
    return numbers


def _reduce(entries: dict[str, _Entry], ranks: Ranks) -> None:
    """Add up sums and units over all processes, in one collective, by sorted name."""
    names = sorted(entries)
    sums = torch.tensor([[entries[name].total, entries[name].units] for name in names])
    for name, (total, units) in zip(names, ranks.sum(sums.double()).tolist(), strict=True):
        entries[name].total, entries[name].units = total, units


def _mean(entry: _Entry) -> float:
    mean = entry.total / entry.units
    if entry.finish is None:
        return mean
    try:
        return entry.finish(mean)
    except OverflowError:
        return float("inf")
