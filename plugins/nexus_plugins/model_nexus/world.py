"""The world model: predict the model's own next states, and remember what followed which state."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.delta import delta_scan
from nexus_plugins.model_nexus.residual import Final, GatedWrite, Part, drawn, widened

__all__ = ["RememberingWorldModel", "WorldModel", "starts"]

CHANGE_SCALE = 0.1
"""Scale of the initial weights of a move, so that states initially hardly change."""


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

    def observe(self, final: Final) -> dict[str, Tensor | int]:
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


class RememberingWorldModel(WorldModel):
    """A world model that also learns the moves of each document while it reads it.

    Its memory is a linear map from the code of a state to what follows it, and is empty when a
    document starts. Each token corrects it: what the memory expected after the last state is
    replaced by what came, `M += beta k (v - M' k)'` with k the code of the state before. What it
    expects after the current state is added to the stream, in training and in generation.

    Shapes: B batch, T time, D model, N code.

    Args:
        memory: width N of codes and of what follows; the other arguments are those of `WorldModel`.
        chunk_length: tokens per chunk in `forward`; affects only speed and rounding.

    Source: the delta rule as a fast weight memory (Schlag et al. 2021, "Linear Transformers Are
        Secretly Fast Weight Programmers"); keys that are one token behind the values, as in an
        induction head (Olsson et al. 2022).
    """

    writes: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        d_latent: int = 64,
        levels: int = 3,
        heads: int = 0,
        stride: int = 1,
        memory: int = 32,
        chunk_length: int = 64,
    ) -> None:
        super().__init__(d_model, d_latent, levels, heads, stride)
        self.sizes = [memory, memory, 1]
        self.chunk_length = chunk_length
        self.read = nn.Linear(d_model, sum(self.sizes))
        self.write = GatedWrite(memory, d_model)
        nn.init.ones_(self.read.bias[-1:])  # initially, most of what was expected is replaced

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the memory expects after each state of whole sequences, `(B, T, D)`."""
        code, value, beta = self._read(h)
        before = F.pad(code[:, :-1], (0, 0, 1, 0))
        if document is not None:
            goes_on = F.pad(document[:, 1:] == document[:, :-1], (1, 0))
            before = before * goes_on.unsqueeze(-1)
        query, key, values = (part.unsqueeze(2) for part in (code, before, value))
        rest = torch.zeros_like(beta)
        expected = delta_scan(query, key, values, beta, rest, document, self.chunk_length)
        return self.write(expected.squeeze(2).to(h.dtype)), {}

    def step(self, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The update `(B, D)` of one token `(B, D)`, equal to `forward`, and the new state."""
        memory, before = state
        code, value, beta = self._read(h)
        surprise = beta * (value - torch.einsum("bn,bnp->bp", before, memory))
        memory = memory + torch.einsum("bn,bp->bnp", before, surprise)
        expected = torch.einsum("bn,bnp->bp", code, memory)
        return self.write(expected.to(h.dtype)), (memory, code)

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """An empty memory `(B, N, N)`, and the code of no state, `(B, N)`."""
        width, weight = self.sizes[0], self.read.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return (
            weight.new_zeros((batch, width, width), dtype=dtype),
            weight.new_zeros((batch, width), dtype=dtype),
        )

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of length one `(..., N)`, what came `(..., N)`, how much it counts `(..., 1)`."""
        code, value, beta = torch.split(widened(self.read(h)), self.sizes, -1)
        return F.normalize(code, dim=-1), value, torch.sigmoid(beta)


def starts(ids: Tensor, stride: int) -> Tensor:
    """One position of each block of `stride`, `(B, S)`, drawn by the tokens before it.

    In a last, shorter block the draw may miss; its start is then the last position, from which
    nothing can be predicted.

    Args:
        ids: `(B, T)` token ids.
        stride: positions per block.
    """
    firsts = torch.arange(0, ids.shape[1], stride, device=ids.device)
    return (firsts + drawn(ids, stride)[:, ::stride]).clamp(max=ids.shape[1] - 1)
