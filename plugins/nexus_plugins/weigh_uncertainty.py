"""Weighs the loss terms by a noise level that is learned for each."""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import Plugin, PluginConfig, StateDict, hookimpl

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["WeighUncertaintyConfig", "WeighUncertaintyPlugin"]


class WeighUncertaintyConfig(PluginConfig):
    """Settings of weighing by uncertainty."""

    lr: float = Field(0.05, gt=0, description="longest step of a log-variance, in nats")


class WeighUncertaintyPlugin(Plugin[WeighUncertaintyConfig]):
    """Weighs each term by `exp(-s)`, where `s` is a log-variance learned along with the model.

    What is minimised is the sum over terms of `exp(-s) * loss + s`; its gradient in `s` is known,
    `1 - exp(-s) * loss`, so `s` moves towards the logarithm of its loss without a graph. The
    `s` does not show in `train/total_loss`. Weights, times the term's own `weight`, are logged
    as `weight/<term>`.

    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh
    Losses", equation 10 with the common factor 1/2 left out. Deviation: `s` has plain gradient
    descent of its own with the gradient limited to -1..1, so that a loss of any scale moves it
    evenly; the paper trains it with the model's optimizer.
    """

    slot: ClassVar[str | None] = "weighing"
    _log_variances: dict[str, Tensor]

    def __init__(self, config: WeighUncertaintyConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self._log_variances = {}

    @hookimpl
    def weigh_losses(self, engine: Engine, terms: tuple[str, ...]) -> dict[str, Tensor]:
        """The weights of the terms of this step."""
        own = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
        weights = {}
        for name in terms:
            start = torch.zeros((), device=engine.device)
            variance = self._log_variances.setdefault(name, start)
            weights[name] = own.get(name, 1.0) * torch.exp(-variance)
            engine.log(f"weight/{name}", weights[name])
        return weights

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Descend in each log-variance; a loss that is not finite leaves it where it is."""
        for name, loss in engine.losses.items():
            variance = self._log_variances[name]
            gradient = 1 - torch.exp(-variance) * engine.ranks.sum(loss).detach().float()
            step = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
            self._log_variances[name] = variance - self.config.lr * step

    def state_dict(self) -> StateDict:
        """The log-variances by term."""
        return {"log_variances": dict(self._log_variances)}

    def load_state_dict(self, state: StateDict) -> None:
        """Take over the log-variances."""
        self._log_variances = dict(cast(dict[str, Tensor], state["log_variances"]))
