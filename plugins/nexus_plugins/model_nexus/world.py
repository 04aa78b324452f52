"""The world model: predict the model's own next states, given the next tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import Final, Part

__all__ = ["WorldModel"]

CHANGE_SCALE = 0.1
"""Scale of the initial weights of a move, so that states initially hardly change."""


class WorldModel(Part):
    """Predict the next token's final hidden state from the current state and that token.

    The prediction is rolled out: the predicted state and the token after it give the state after
    that, and so on. To be predictable from itself, a state must hold all that later ones need: it
    becomes a belief about the latent state behind the tokens. In addition, heads predict the tokens
    2, 3, ... ahead from the state alone, through the model's own output matrix.

    It writes nothing to the residual stream: it shapes the states in training, and generation
    either ignores it or drafts with it.

    Shapes: B batch, T time, D model, K moves, M heads.

    Args:
        d_model: width D of the states.
        d_latent: hidden width of a move.
        levels: moves K that are rolled out in training.
        heads: heads M; head m predicts the token m + 1 ahead of a state.

    Source: next-latent prediction (Teoh et al. 2025, "Next-Latent Prediction Transformers Learn
        Compact World Models"): a residual network on state and token, with targets that have no
        gradient. Heads: multi-token prediction (Gloeckle et al. 2024), each here a residual
        network of two layers instead of a transformer layer.
    """

    writes: ClassVar[bool] = False

    def __init__(self, d_model: int, d_latent: int = 64, levels: int = 3, heads: int = 0) -> None:
        super().__init__()
        self.levels = levels
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
        """Roll out predictions from the final states of whole sequences.

        Returns:
            The predictions `world` and their targets `world_targets`, both `(B, T, K, D)`: of the
            states 1, 2, ..., K tokens ahead; `world_mask` `(B, T, K)`, whether the target is in the
            same document; and `world_heads` `(B, T, M, D)`, whose products with the output matrix
            are logits of the tokens 2, 3, ... ahead. Targets that do not exist are 0.
        """
        hidden, document = final.hidden, final.document
        moves, state, still = self.from_token(final.tokens), hidden, hidden.detach()
        predictions, targets, masks = [], [], []
        for ahead in range(1, self.levels + 1):
            state = self._moved(state, later(moves, ahead))
            predictions.append(state)
            targets.append(later(still, ahead))
            masks.append(same_document(hidden, document, ahead))
        mask = torch.stack(masks, 2)
        return {
            "world": torch.stack(predictions, 2),
            "world_targets": torch.stack(targets, 2) * mask.unsqueeze(-1),
            "world_mask": mask,
            "world_heads": torch.stack([hidden + head(hidden) for head in self.heads], 2)
            if self.heads
            else hidden.unsqueeze(2)[:, :, :0],
        }

    def _moved(self, state: Tensor, move: Tensor) -> Tensor:
        moved: Tensor = state + self.change(F.silu(self.from_state(state) + move))
        return moved


def later(values: Tensor, ahead: int) -> Tensor:
    """Values `ahead` positions later, 0 past the end; `(B, T, ...)`."""
    ahead = min(ahead, values.shape[1])
    return F.pad(values[:, ahead:], (0, 0) * (values.dim() - 2) + (0, ahead))


def same_document(hidden: Tensor, document: Tensor | None, ahead: int) -> Tensor:
    """`(B, T)`: whether the position `ahead` exists and is in the same document."""
    if document is None:
        document = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    ahead = min(ahead, document.shape[1])
    return F.pad(document[:, ahead:] == document[:, : document.shape[1] - ahead], (0, ahead))
