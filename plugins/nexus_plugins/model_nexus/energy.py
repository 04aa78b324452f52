"""The energy module: refine token codes in a loop, each until its energy is used up."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import Final, GatedWrite, Part, drawn, widened

__all__ = ["EnergyModule"]

EAGERNESS = 8.0
"""How much faster this gate opens than others from the same start; loops train through it."""
TILE = 16
"""Tokens are refined in multiples of this, as a matmul's rounding depends on its rows."""


class EnergyModule(Part):
    """Refine a code of each token with one shared layer, until it has settled.

    A code is initialized from the token's state. A refinement reads the codes of the token and of
    the W - 1 before it, `z += V silu(K [z(t), z(t-1), ...] + c(h))`: looped, it propagates settled
    codes from token to token. The energy of a code is its remaining cost: the nats by which the
    token's loss would fall with all refinements. The layer also predicts the energy that a
    refinement leaves.

    In training all refinements are computed, so that energies are known. In evaluation and
    generation a token whose predicted energy is below the threshold has settled: its code is
    frozen, also for the tokens that read it. On CPU only unsettled tokens are computed, so easy
    text takes less time; on an accelerator all are, which avoids a device sync.

    Shapes: B batch, T time, D model, C code, M hidden units, W window, K refinements, N = B * T.

    Args:
        d_model: width D of the backbone states.
        d_code: width C of the codes.
        n_memories: hidden units M of the shared layer, the memories that codes are matched against.
        max_iterations: maximum refinements K.
        threshold: a token has settled when its predicted energy, in nats, is below this.
        window: codes W that a refinement reads.

    Source: a layer shared over depth as in universal transformers (Dehghani et al. 2019) and
        recurrent depth (Geiping et al. 2025). Tokens exit early when that costs nothing, as in CALM
        (Schuster et al. 2022), but the cost itself is predicted, and each exit learns from the last
        one, as in self-distillation (Zhang et al. 2019).
    """

    def __init__(
        self,
        d_model: int,
        d_code: int = 32,
        n_memories: int = 32,
        max_iterations: int = 8,
        threshold: float = 0.01,
        window: int = 8,
    ) -> None:
        super().__init__()
        self.max_iterations = max_iterations
        self.threshold = threshold
        self.window = window
        self.d_code = d_code
        self.read = nn.Linear(d_model, d_code + n_memories)
        self.keys = nn.Linear(window * d_code, n_memories, bias=False)
        self.values = nn.Linear(n_memories, d_code + 1)
        self.write = GatedWrite(d_code, d_model)
        with torch.no_grad():
            self.write.projection.weight.mul_(EAGERNESS)
            self.write.gate.div_(EAGERNESS)
        nn.init.zeros_(self.values.bias[-1:])  # initially, all tokens expect a gain of about 1 nat

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Update whole sequences.

        Args:
            h: `(B, T, D)` normalized backbone states.
            document: `(B, T)` non-decreasing document indices; None: each row is one document.

        Returns:
            The update `(B, T, D)`, and `{"energy": reports}`: `codes` `(B, T, K, C)` after each
            refinement; `foreseen` `(B, T, K)`, the logarithms of the energies predicted there; and
            `refinements` `(B, T)`, how many a token takes to settle.
        """
        code, context = self._read(h)
        reach = [self._same(h, document, back).flatten() for back in range(1, self.window)]
        with torch.autocast(h.device.type, enabled=False):
            codes, energies = self._settle(code.flatten(0, 1), context.flatten(0, 1), reach)
        trail = torch.stack(codes, 1).view(*h.shape[:2], -1, self.d_code)
        foreseen = torch.stack(energies, 1).view(*h.shape[:2], -1)
        going_on = foreseen[..., :-1].detach() >= math.log(self.threshold)
        made = 1.0 + going_on.cumprod(-1).sum(-1)
        reports = {"codes": trail, "foreseen": foreseen, "refinements": made}
        return self.write(trail[:, :, -1].to(h.dtype)), {"energy": reports}

    def observe(self, final: Final) -> dict[str, dict[str, Tensor]]:
        """Draw one refinement of each token, for the loss to train.

        Returns:
            `{"energy": reports}`: `early` `(B, T, D)`, the final states if tokens had settled after
            one of the refinements 1 to K - 1; `foreseen` `(B, T)`, the logarithm of the energy
            predicted there; and `refinements` `(B, T)`.
        """
        reports = final.reports["energy"]
        codes, foreseen = reports["codes"], reports["foreseen"]
        which = drawn(final.ids, max(1, codes.shape[2] - 1)).unsqueeze(-1)
        early = codes.gather(2, which.unsqueeze(-1).expand(*which.shape, codes.shape[-1]))
        change = self.write((early.squeeze(2) - codes[:, :, -1]).to(final.stream.dtype))
        picked = {
            "early": final.norm(final.stream + change),
            "foreseen": foreseen.gather(-1, which).squeeze(-1),
            "refinements": reports["refinements"],
        }
        return {"energy": picked}

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """The codes before each refinement of the last tokens, `(B, K, W - 1, C)`, newest first."""
        dtype = torch.promote_types(self.read.weight.dtype, torch.float32)
        shape = (batch, self.max_iterations, self.window - 1, self.d_code)
        return (self.read.weight.new_zeros(shape, dtype=dtype),)

    def step(self, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The update `(B, D)` of one token `(B, D)`, equal to `forward`, and the new state."""
        (past,) = state
        code, context = self._read(h)
        moving, kept = torch.ones_like(code[:, 0], dtype=torch.bool), []
        with torch.autocast(h.device.type, enabled=False):
            for number in range(self.max_iterations):
                windows = torch.cat([_normed(code).unsqueeze(1), past[:, number]], 1)
                kept.append(windows[:, :-1])
                change, energy = self._refine(windows.flatten(1), context)
                code = torch.where(moving.unsqueeze(-1), code + change, code)
                moving = moving & self._goes_on(energy)
        return self.write(code.to(h.dtype)), (torch.stack(kept, 1),)

    def _settle(
        self, code: Tensor, context: Tensor, reach: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Codes `(N, C)` and logarithms of foreseen energies `(N,)` after each refinement.

        `reach[b - 1]` `(N,)` says whether the position b earlier is in the same document.
        """
        places = torch.arange(len(code), device=code.device)
        energy = torch.zeros_like(code[:, 0])
        moving = torch.ones_like(energy, dtype=torch.bool)
        trail, foreseen = [], []
        for _ in range(self.max_iterations):
            everyone = len(places) == len(code)
            if everyone:
                change, left = self._refine(_windows(code, reach), context)
                code = code + (change if code.is_cpu else change * moving.unsqueeze(-1))
                energy = left
            elif len(places):
                change, left = self._refine(_windows(code, reach, places), context[places])
                code = code.index_add(0, places, change)
                energy = energy.index_copy(0, places, left)
            moving = moving & self._goes_on(energy)
            trail.append(code)
            foreseen.append(energy)
            if code.is_cpu and not self.training:
                places = places[moving[places]]
        return trail, foreseen

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [self.d_code, self.keys.out_features]
        code, context = torch.split(widened(self.read(h)), sizes, -1)
        return code, context

    def _refine(self, windows: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The change of codes `(n, C)`, and the log of the energy foreseen after it, `(n,)`."""
        count = len(windows)
        windows, context = (F.pad(rows, (0, 0, 0, -count % TILE)) for rows in (windows, context))
        matched = F.silu(F.linear(windows, widened(self.keys.weight)) + context)
        values = F.linear(matched, widened(self.values.weight), widened(self.values.bias))[:count]
        return values[:, :-1], values[:, -1]

    def _goes_on(self, energy: Tensor) -> Tensor:
        """Whether to refine codes further, given the logarithms of their foreseen energies."""
        return (energy >= math.log(self.threshold)) | self.training

    def _same(self, h: Tensor, document: Tensor | None, back: int) -> Tensor:
        """`(B, T)`: whether the position `back` earlier exists and is in the same document."""
        if document is None:
            document = torch.zeros(h.shape[:2], dtype=torch.long, device=h.device)
        back = min(back, document.shape[1])
        earlier = document[:, : document.shape[1] - back]
        return F.pad(document[:, back:] == earlier, (back, 0))


def _windows(code: Tensor, reach: list[Tensor], places: Tensor | None = None) -> Tensor:
    """The codes `(n, W * C)` at some or all positions and before them; missing ones are 0."""
    normed = _normed(code)
    if places is None:
        length = len(normed)
        backs = [min(back, length) for back in range(1, len(reach) + 1)]
        earlier = [F.pad(normed[: length - back], (0, 0, back, 0)) for back in backs]
    else:
        normed, whole = normed[places], normed
        earlier = [whole[(places - back).clamp_min(0)] for back in range(1, len(reach) + 1)]
        reach = [near[places] for near in reach]
    pairs = zip(earlier, reach, strict=True)
    return torch.cat([normed, *(code * near.unsqueeze(-1) for code, near in pairs)], -1)


def _normed(code: Tensor) -> Tensor:
    return F.rms_norm(code, code.shape[-1:])
