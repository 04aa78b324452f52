"""A layer that mixes the channels of each token alone."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Mlp"]


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
        """Map each token of `(B, T, D)`; documents make no difference."""
        result: Tensor = self.out_proj(self.in_proj(x).relu().square())
        return result

    def step(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        """Map one token `(B, D)`; there is nothing to remember."""
        return self(x), state

    def initial_state(self, batch: int) -> tuple[()]:
        """Nothing."""
        return ()
