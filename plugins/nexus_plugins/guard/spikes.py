"""Detect losses that stand out from the recent ones."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nexus_core import StateDict

__all__ = ["Spikes"]

_SIGMA = 1.4826  # standard deviations in a median absolute deviation, for a normal distribution


class Spikes:
    """Compares a loss with the median of recent losses, in units of their robust deviation.

    Everything stays on the device. Outliers are not added to the window, so that a series of bad
    losses does not become the norm.

    Args:
        threshold: deviations above the median that count as a spike; None disables it.
        window: number of losses kept; nothing counts as a spike until the window is full.
    """

    def __init__(self, threshold: float | None, window: int) -> None:
        self.enabled = threshold is not None
        self._threshold = threshold or 0.0
        self._recent = torch.zeros(window if self.enabled else 0)
        self._seen = torch.zeros((), dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Move the losses to a device."""
        self._recent, self._seen = self._recent.to(device), self._seen.to(device)

    def judge(self, loss: Tensor) -> Tensor:
        """True if the loss stands out; no device sync.

        Args:
            loss: 0-d.
        """
        window = self._recent.numel()
        median = self._recent.median()
        deviation = _SIGMA * (self._recent - median).abs().median()
        high = loss > median + self._threshold * deviation.clamp(min=1e-6)
        spike = high & (self._seen >= window)
        normal = loss.isfinite() & ~spike
        place = torch.arange(window, device=loss.device) == self._seen % window
        self._recent = torch.where(place & normal, loss, self._recent)
        self._seen = self._seen + normal
        return spike

    def state_dict(self) -> StateDict:
        """The losses in the window."""
        return {"recent": self._recent, "seen": self._seen} if self.enabled else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what `state_dict` returned; a different window size starts empty.

        Raises:
            ValueError: the state is invalid.
        """
        if not (self.enabled and state):
            return
        recent, seen = cast(Tensor, state["recent"]), cast(Tensor, state["seen"])
        if recent.ndim != 1 or recent.dtype != self._recent.dtype:
            raise ValueError(f"the stored losses are {tuple(recent.shape)}, {recent.dtype}")
        if seen.ndim != 0 or seen.dtype != self._seen.dtype or seen < 0:
            raise ValueError("the count of losses is not an integer")
        if recent.shape == self._recent.shape:
            self._recent = recent.to(self._recent.device)
            self._seen = seen.to(self._seen.device)
