"""Shared by the modules: their interface, and how they write to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["GATE_START", "Final", "GatedWrite", "Part", "drawn", "in_turn", "widened"]

StateT = TypeVar("StateT")

GATE_START = 0.01
PRIMES = (2_654_435_761, 6_364_136_223_846_793_005)
"""Odd multipliers (Knuth) that scatter numbers over 64 bits."""


class Final(NamedTuple):
    """Whole sequences after all modules have written to the stream."""

    stream: Tensor
    """(B, T, D)"""
    hidden: Tensor
    """(B, T, D): the stream after the final norm, which the head reads."""
    norm: Callable[[Tensor], Tensor]
    """The final norm."""
    ids: Tensor
    """(B, T)"""
    tokens: Tensor
    """(B, T, D) embeddings."""
    document: Tensor | None
    """(B, T): non-decreasing document indices; None: each row is one document."""
    reports: Mapping[str, Any]
    """The modules' reports."""


class Part(nn.Module):
    """A module on the backbone: it reads the states and returns an update of the stream.

    No update may depend on a later token, another row of the batch or another document. A module
    that depends on earlier tokens keeps what it needs in its own state.
    """

    writes: ClassVar[bool] = True
    """Whether it updates the stream; one that does not is skipped in generation."""

    muted = False
    """Whether the module's update is suppressed."""

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Suppress the module's update, while it still reports."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Compute the update, and the module's reports for its loss.

        Args:
            h: `(B, T, D)` normalized backbone states.
            document: `(B, T)` non-decreasing document indices; None: each row is one document.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def observe(self, final: Final) -> Mapping[str, Any]:
        """Its reports after all modules have written; empty by default."""
        return {}

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """Its state before the first token: tensors with a row per sequence."""
        return ()

    def step(self, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The update `(B, D)` of one token `(B, D)`, equal to `forward`, and the new state."""
        update: Tensor = self(h)[0]
        return update, state


def in_turn(
    step: Callable[[Tensor, StateT], tuple[Tensor, StateT]], tokens: Tensor, state: StateT
) -> tuple[Tensor, list[StateT]]:
    """Take a step for each of a few tokens `(B, k, ...)`.

    Returns:
        The outputs of the steps `(B, k, ...)`, and the state after each.
    """
    updates, after = [], []
    for token in tokens.unbind(1):
        update, state = step(token, state)
        updates.append(update)
        after.append(state)
    return torch.stack(updates, 1), after


class GatedWrite(nn.Module):
    """Turn a module's result into an update of the residual stream that starts near zero.

    The gate starts small and the projection does not, so the update initially barely changes the
    stream, while both of them (and everything before them) receive a gradient.

    Args:
        d_in: width of the module's result.
        d_model: width D of the residual stream.

    Source: per-channel gates on a residual branch as in LayerScale (Touvron et al. 2021).
    """

    def __init__(self, d_in: int, d_model: int) -> None:
        super().__init__()
        self.projection = nn.Linear(d_in, d_model, bias=False)
        self.gate = nn.Parameter(torch.full((d_model,), GATE_START))

    def forward(self, result: Tensor) -> Tensor:
        """Project `(..., d_in)` to an update `(..., D)`."""
        update: Tensor = self.projection(result) * self.gate
        return update


def widened(value: Tensor) -> Tensor:
    """The value in float32, or in its own dtype if that is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def drawn(ids: Tensor, count: int) -> Tensor:
    """A number below `count` for each position `(B, T)`, by a hash of the tokens up to it.

    Every number is equally likely, whatever the layout of the rows, and the draw is a function of
    the row alone: resuming, micro-batches, ranks and padding at the end do not change it.
    """
    seen = ids.cumsum(1) + torch.arange(ids.shape[1], device=ids.device) * PRIMES[0]
    return (seen * PRIMES[1] >> 32) % count
