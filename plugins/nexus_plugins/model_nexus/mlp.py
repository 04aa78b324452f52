"""A layer that mixes the channels of each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["Mlp", "squared_relu"]


class Mlp(nn.Module):
    """Two linear maps with a squared ReLU between them.

    Args:
        d_model: width of input and output.
        expand: inner width over `d_model`.

    Source: So et al. 2021, "Primer" (squared ReLU).
    """

    def __init__(self, d_model: int, expand: int = 4) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, expand * d_model, bias=False)
        self.out_proj = nn.Linear(expand * d_model, d_model, bias=False)

    def forward(self, x: Tensor, document: Tensor | None = None) -> Tensor:
        """Map each token of `(B, T, D)`; documents are irrelevant."""
        result: Tensor = self.out_proj(squared_relu(self.in_proj(x)))
        return result

    def step(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        """Map one token `(B, D)`; there is no state."""
        return self(x), state

    def initial_state(self, batch: int) -> tuple[()]:
        """No state."""
        return ()


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x) ** 2`, with half of autograd's memory traffic."""
    result: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return result


class _SquaredReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        positive = x.relu()
        return positive.mul_(positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        positive: Tensor = x.relu()
        return torch.addcmul(x.new_zeros(()), positive, grad, value=2, out=positive)
