"""What the modules share: their shape, and how they write to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GATE_START", "GatedWrite", "Part", "widened"]

GATE_START = 0.01


class Part(nn.Module):
    """A module beside the backbone: it reads the states and answers with an update of the stream.

    No update may depend on another token: whatever crosses time is the backbone's.
    """

    muted = False
    """Whether what the module writes is left out of the stream."""

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Leave out what the module writes, while it reports as ever."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The update, and what the module reports for its loss.

        Args:
            h: `(B, T, D)` normed states of the backbone.
            document: `(B, T)` non-decreasing numbers of documents; None: every row is one.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def step(self, h: Tensor) -> Tensor:
        """The update `(B, D)` of one token `(B, D)`; the same as `forward`."""
        update: Tensor = self(h)[0]
        return update


class GatedWrite(nn.Module):
    """Turn a module's result into an update of the residual stream that starts near zero.

    The gate is small and the projection is not, so at the start the update hardly moves the
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
    """The value in float32, or in its own type where that is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
