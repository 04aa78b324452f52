"""The world model: predict the model's own next states, given the next tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import Final, Part

__all__ = ["WorldModel", "starts"]

CHANGE_SCALE = 0.1
"""Scale of the initial weights of a move, so that states initially hardly change."""
PRIMES = (2_654_435_761, 6_364_136_223_846_793_005)
"""Odd multipliers (Knuth) that scatter numbers over 64 bits."""


class WorldModel(Part):
    """Predict the next token's final hidden state from the current state and that token.

    The prediction is rolled out: the predicted state and the token after it give the state after
    that, and so on. To be predictable from itself, a state must hold all that later ones need: it
    becomes a belief about the latent state behind the tokens. In addition, heads predict the tokens
    2, 3, ... ahead from the state alone, through the model's own output matrix.

    With a stride, only one position of each block of that many starts a roll-out, so that long ones
    are affordable; see `starts`.

    It writes nothing to the residual stream: it shapes the states in training, and generation
    either ignores it or drafts with it.

    Shapes: B batch, T time, D model, K moves, M heads, S = ceil(T / stride) starts.

    Args:
        d_model: width D of the states.
        d_latent: hidden width of a move.
        levels: moves K that are rolled out in training.
        heads: heads M; head m predicts the token m + 1 ahead of a state.
        stride: positions per start of a roll-out.

    Source: next-latent prediction (Teoh et al. 2025, "Next-Latent Prediction Transformers Learn
        Compact World Models"): a residual network on state and token, with targets that have no
        gradient. Heads: multi-token prediction (Gloeckle et al. 2024), each here a residual
        network of two layers instead of a transformer layer.
    """

    writes: ClassVar[bool] = False

    def __init__(
        self, d_model: int, d_latent: int = 64, levels: int = 3, heads: int = 0, stride: int = 1
    ) -> None:
        super().__init__()
        self.levels = levels
        self.stride = stride
        self.from_state = nn.Linear(d_model, d_latent)
        self.from_token = nn.Linear(d_model, d_latent, bias=False)
        self.change = nn.Linear(d_latent, d_model)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, d_latent), nn.SiLU(), nn.Linear(d_latent, d_model))
            for _ in range(heads)
        )
        with torch.no_grad():
            self.change.weight *= CHANGE_SCALE

    def move(self, state: Tensor, token: Tensor) -> Tensor:
        """The state `(..., D)` after a token whose embedding is `token` `(..., D)`."""
        return self._moved(state, self.from_token(token))

    def observe(self, final: Final) -> dict[str, Tensor]:
        """Roll out predictions from final states of whole sequences.

        Returns:
            `world_starts` `(B, S)`, the positions that they start from, and `world_stride`; the
            predictions `world` and their targets `world_targets`, both `(B, S, K, D)`: of the
            states 1, 2, ..., K tokens ahead; `world_mask` `(B, S, K)`, whether the target is in the
            same document; and `world_heads` `(B, S, M, D)`, whose products with the output matrix
            are logits of the tokens 2, 3, ... ahead. Targets that do not exist are 0.
        """
        hidden, (rows, length) = final.hidden, final.ids.shape
        places = starts(final.ids, self.stride)
        ahead = places + torch.arange(1, self.levels + 1, device=places.device).view(-1, 1, 1)
        there = ahead.clamp(max=length - 1)
        row = torch.arange(rows, device=places.device).unsqueeze(1)
        moves = self.from_token(final.tokens)[row, there]
        first = state = hidden[row, places] if self.stride > 1 else hidden
        predictions = [state := self._moved(state, move) for move in moves]
        mask = ahead < length
        if final.document is not None:
            mask = mask & (final.document[row, there] == final.document[row, places])
        targets = hidden.detach()[row, there] * mask.unsqueeze(-1)
        return {
            "world": torch.stack(predictions, 2),
            "world_targets": targets.movedim(0, 2),
            "world_mask": mask.movedim(0, 2),
            "world_heads": torch.stack([first + head(first) for head in self.heads], 2)
            if self.heads
            else first.unsqueeze(2)[:, :, :0],
            "world_starts": places,
            "world_stride": self.stride,
        }

    def _moved(self, state: Tensor, move: Tensor) -> Tensor:
        moved: Tensor = state + self.change(F.silu(self.from_state(state) + move))
        return moved


def starts(ids: Tensor, stride: int) -> Tensor:
    """One position of each block of `stride`, `(B, S)`, drawn by a hash of the tokens before it.

    Every position of a block is equally likely, whatever the layout of the rows, and the draw is a
    function of the row alone: resuming, micro-batches, ranks and padding at the end do not change
    it. In a last, shorter block the draw may miss; its start is then the last position, from which
    nothing can be predicted.

    Args:
        ids: `(B, T)` token ids.
        stride: positions per block.
    """
    firsts = torch.arange(0, ids.shape[1], stride, device=ids.device)
    seen = ids.cumsum(1)[:, ::stride] + firsts * PRIMES[0]
    return (firsts + (seen * PRIMES[1] >> 32) % stride).clamp(max=ids.shape[1] - 1)
