"""What the modules share: how they read the backbone's state and how they write back to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GATE_START", "GatedWrite", "widened"]

GATE_START = 0.01


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
