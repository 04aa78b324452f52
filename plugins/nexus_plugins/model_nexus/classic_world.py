"""The classic world model: from the latent of a token, predict the latents of later tokens."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_core.errors import ConfigError
from nexus_plugins.model_nexus.residual import GatedWrite, Part, widened

__all__ = ["ClassicWorldModel"]


class ClassicWorldModel(Part):
    """Predict latents 1, 2, 4, ... tokens ahead, and write the expectation to the stream.

    It learns in latent space: targets are the later states encoded by a slowly moving copy of the
    encoder, without gradient. The copy has `requires_grad=False`, so no optimizer trains it; it is
    part of the `state_dict`, and `update_target` moves it after each optimizer step.

    Shapes: B batch, T time, D model, L levels.

    Args:
        d_model: width D of the backbone states.
        d_latent: width of the latents.
        levels: how many distances L to predict; level l looks 2**l tokens ahead.

    Source: joint-embedding prediction as in I-JEPA (Assran et al. 2023), targets normalised
        without learned scale as there; EMA targets of BYOL (Grill et al. 2020). Deviation: the
        copy is of the encoder on top of the backbone, not of the backbone too, which would cost a
        second forward pass.
    """

    def __init__(self, d_model: int, d_latent: int = 64, levels: int = 3) -> None:
        super().__init__()
        self.levels = levels
        self.encoder = nn.Sequential(
            nn.Linear(d_model, d_latent), nn.SiLU(), nn.Linear(d_latent, d_latent)
        )
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(d_latent, 2 * d_latent), nn.SiLU(), nn.Linear(2 * d_latent, levels * d_latent)
        )
        self.write = GatedWrite(levels * d_latent, d_model)

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Update whole sequences, and report predictions and targets.

        Args:
            h: `(B, T, D)` normalized backbone states.
            document: `(B, T)` non-decreasing document indices; None: each row is one document.

        Returns:
            The update `(B, T, D)`, and a dict with the predictions `world` and their targets
            `world_targets`, both `(B, T, L, d_latent)`, and `world_mask` `(B, T, L)`: whether the
            target is in the same document. Targets that do not exist are 0.
        """
        expected = self.predictor(self.encoder(h))
        targets, mask = self._targets(h.detach(), document)
        predictions = expected.unflatten(-1, (self.levels, -1))
        reports = {"world": predictions, "world_targets": targets, "world_mask": mask}
        return self.write(expected), reports

    def step(self, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The update `(B, D)` of one token `(B, D)`, without the targets."""
        update: Tensor = self.write(self.predictor(self.encoder(h)))
        return update, state

    @torch.no_grad()
    def update_target(self, decay: float | Tensor) -> None:
        """Move the target encoder to `decay * itself + (1 - decay) * encoder`."""
        sources = dict(self.encoder.named_parameters())
        if sources.keys() != {name for name, _ in self.target_encoder.named_parameters()}:
            raise ConfigError(
                "the world model's target encoder tracks the weights of its encoder, which has "
                "adapters here; do not adapt the encoder (peft.target), or remove loss_world"
            )
        for name, target in self.target_encoder.named_parameters():
            if isinstance(decay, Tensor):
                weight = (1 - decay).to(target)
            else:  # created on the device, as a copy would sync
                weight = target.new_full((), 1 - decay)
            target.lerp_(sources[name], weight)

    @torch.no_grad()
    def _targets(self, h: Tensor, document: Tensor | None) -> tuple[Tensor, Tensor]:
        latents = widened(self.target_encoder(h))
        latents = F.layer_norm(latents, latents.shape[-1:])
        if document is None:
            document = torch.zeros(h.shape[:2], dtype=torch.long, device=h.device)
        offsets = [2**level for level in range(self.levels)]
        same = [_ahead(document, offset, -1) == document for offset in offsets]
        mask = torch.stack(same, 2)
        later = torch.stack([_ahead(latents, offset, 0.0) for offset in offsets], 2)
        return later * mask.unsqueeze(-1), mask


def _ahead(values: Tensor, offset: int, missing: float) -> Tensor:
    """Values `offset` positions later in time, `missing` past the end."""
    offset = min(offset, values.shape[1])
    end = values.new_full((values.shape[0], offset, *values.shape[2:]), missing)
    return torch.cat([values[:, offset:], end], 1)
