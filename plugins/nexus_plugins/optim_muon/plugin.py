"""Muon for the hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.optim import AdamW, Optimizer

from nexus_core import ConfigError, Plugin, hookimpl
from nexus_core.errors import hint_add
from nexus_core.signatures import Lax, Several
from nexus_plugins._shared.fused import has_fused
from nexus_plugins._shared.parameters import OptimizerConfig, blocks, decaying, groups_of, matching
from nexus_plugins.optim_muon.muon import Muon, MuonAndAdamw

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["OptimMuonConfig", "OptimMuonPlugin"]


class OptimMuonConfig(OptimizerConfig):
    """Settings of Muon with AdamW."""

    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon: momentum")
    nesterov: bool = Field(default=True, description="Muon: Nesterov momentum")
    adjust: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw",
        description="Muon: scale updates to AdamW's size, so that both share one learning rate, "
        "or as in the original",
    )
    exclude: Several[str] = Field(
        default=(), description="patterns of names of matrices to train with AdamW"
    )
    betas: Lax[tuple[float, float]] = Field(
        default=(0.9, 0.95), description="AdamW: decay rates of the two running means"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW: term added to the denominator")


class OptimMuonPlugin(Plugin[OptimMuonConfig]):
    """Trains hidden matrices with Muon, whose updates are orthogonalized, and the rest with AdamW.

    The rest: vectors, norms, biases, embeddings, heads, convolutions, and what `exclude` names. A
    linear layer counts as a head if it has as many outputs as an embedding has entries and no
    linear layer takes that many inputs, or if it is outside every ModuleList and mirrors the
    embedding's shape. The run summary says what Muon trains. Weight decay as in `optim_adamw`.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the
    matched update norm: Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4;
    `torch.optim.Muon`, whose products are in bfloat16 on every device.
    """

    config_class = OptimMuonConfig
    slot: ClassVar[str | None] = "optimizer"
    _trained: str = ""

    @hookimpl
    def summarize(self) -> dict[str, str]:
        """Say how many matrices Muon trained."""
        return {"muon": self._trained}

    @hookimpl
    def make_optimizer(self, engine: Engine) -> Optimizer:
        """Build both over the model's parameters.

        Raises:
            ConfigError: a pattern matches nothing, or the model has no hidden matrix.
        """
        config = self.config
        hidden = _hidden_matrices(engine.model, config.exclude)
        matrices, rest = list[dict[str, Any]](), list[dict[str, Any]]()
        # The effect of an orthogonal update with a given RMS grows with the root of the width, that
        # of AdamW with the width; with the author's scaling it does not grow.
        power = 0.5 if config.adjust == "match_rms_adamw" else 0.0
        powers = dict.fromkeys(hidden, power)
        for group in groups_of(engine.model, config, self.name, powers):
            for wanted, groups in ((True, matrices), (False, rest)):
                if members := [p for p in group["params"] if (id(p) in hidden) is wanted]:
                    groups.append({**group, "params": members})
        if not matrices:
            said = "optim_muon: the model has no matrix for Muon to train"
            raise ConfigError(f"{said}; use ", hint_add("optim_adamw"))
        ours, others = (sum(len(g["params"]) for g in groups) for groups in (matrices, rest))
        self._trained = f"trained {ours} matrices; AdamW {others} other parameters"
        muon = Muon(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
            adjust_lr_fn=config.adjust,
        )
        if not rest:
            return muon
        fused = has_fused(engine.device.type)
        adamw = AdamW(rest, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        return MuonAndAdamw(muon, adamw)


def _hidden_matrices(model: nn.Module, exclude: Sequence[str]) -> set[int]:
    """The `id` of each weight matrix of a linear layer that is not a head."""
    named = dict(model.named_parameters())
    left = {n for pattern in exclude for n in matching(named, pattern, "optim_muon.exclude")}
    inside = decaying(model) - _heads(model)
    return {id(p) for n, p in named.items() if id(p) in inside and p.ndim == 2 and n not in left}


def _heads(model: nn.Module) -> set[int]:
    """The `id` of each head's weight; equal sizes may be coincidence (positions, channels)."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    mirrored = {weight.shape for weight in embeddings if len(weight) != weight.shape[1]}
    unread = {shape[0] for shape in mirrored} - {linear.in_features for linear in linears}
    within = {id(m) for block in blocks(model, (), "").values() for m in block.modules()}
    outside = [m for m in linears if m.weight.shape in mirrored and id(m) not in within]
    return {id(m.weight) for m in linears if m.out_features in unread or m in outside}
