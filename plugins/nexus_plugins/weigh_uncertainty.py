"""Weights the loss terms by a learned noise level for each."""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import Plugin, PluginConfig, StateDict, hookimpl

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["WeighUncertaintyConfig", "WeighUncertaintyPlugin"]


class WeighUncertaintyConfig(PluginConfig):
    """Settings of weighing by uncertainty."""

    lr: float = Field(
        default=0.05, gt=0, description="maximum change of a log-variance per step, in nats"
    )


class WeighUncertaintyPlugin(Plugin[WeighUncertaintyConfig]):
    """Weights each term by `exp(-s)`, with a log-variance `s` learned along with the model.

    The objective is the sum over terms of `exp(-s) * loss + s`; its gradient in `s` is known in
    closed form, `1 - exp(-s) * loss`, so `s` moves towards the logarithm of its loss without
    autograd. The added `s` is not part of `train/total_loss`. Weights, times the term's own
    `weight`, are logged as `weight/<term>`. Only a positive loss implies a noise level: while a
    term is zero or below, its `s` is left unchanged, since the sum above would have no minimum.

    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh
    Losses", equation 10 without the common factor 1/2. Deviation: `s` is updated by plain
    gradient descent with the gradient clipped to -1..1, so that a loss of any scale moves it
    evenly; the paper trains it with the model's optimizer.
    """

    config_class = WeighUncertaintyConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "weighing"
    _log_variances: dict[str, Tensor]

    def __post_init__(self) -> None:
        self._log_variances = {}

    @hookimpl
    def weigh_losses(self, engine: Engine, terms: tuple[str, ...]) -> dict[str, Tensor]:
        """The terms' weights in this step."""
        own = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
        weights = {}
        for name in terms:
            start = torch.zeros((), device=engine.device)
            variance = self._log_variances.setdefault(name, start)
            weights[name] = own.get(name, 1.0) * torch.exp(-variance)
            engine.log(f"weight/{name}", weights[name])
        return weights

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        """Update each log-variance whose loss is positive and finite."""
        for name, loss in step.losses.items():
            variance = self._log_variances[name]
            value = engine.ranks.sum(loss).detach().float()
            pull = (1 - torch.exp(-variance) * value).clamp(-1, 1)
            moves = (value > 0) & torch.isfinite(value)
            self._log_variances[name] = variance - self.config.lr * torch.where(moves, pull, 0.0)

    def state_dict(self) -> StateDict:
        """The log-variances by term."""
        return {"log_variances": dict(self._log_variances)}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the log-variances."""
        self._log_variances = dict(cast(dict[str, Tensor], state["log_variances"]))
