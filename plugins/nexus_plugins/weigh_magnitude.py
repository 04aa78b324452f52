"""Weighs the loss terms so that each counts the same, whatever its scale."""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import Plugin, PluginConfig, StateDict, hookimpl

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["WeighMagnitudeConfig", "WeighMagnitudePlugin"]

TINY = 1e-12


class WeighMagnitudeConfig(PluginConfig):
    """Settings of weighing by magnitude."""

    momentum: float = Field(0.99, ge=0, lt=1, description="what the running mean keeps a step")
    total: Literal["terms", "one"] = Field(
        "terms", description="what the weights sum to: the number of terms, or one"
    )


class WeighMagnitudePlugin(Plugin[WeighMagnitudeConfig]):
    """Divides each loss term by the running mean of its magnitude.

    The mean is corrected for its start at zero, as Adam's are. A term's own `weight` is its share:
    twice the weight, twice the part in the total. A term that has not been seen yet counts with
    its own weight until it has. Weights are logged as `weight/<term>`.
    """

    slot: ClassVar[str | None] = "weighing"
    _means: dict[str, Tensor]
    _counts: dict[str, int]

    def __init__(self, config: WeighMagnitudeConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self._means, self._counts = {}, {}

    @hookimpl
    def weigh_losses(self, engine: Engine, terms: tuple[str, ...]) -> dict[str, Tensor | float]:
        """The weights of the terms of this step, from the steps before it."""
        own = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
        weights: dict[str, Tensor | float] = {name: own.get(name, 1.0) for name in terms}
        seen = [name for name in terms if name in self._means]
        raw = {name: own.get(name, 1.0) / self._mean(name).clamp(min=TINY) for name in seen}
        if raw:
            scale = len(seen) / torch.stack(list(raw.values())).sum().clamp(min=TINY)
            weights |= {name: weight * scale for name, weight in raw.items()}
        share = len(terms) if self.config.total == "one" else 1
        weights = {name: weight / share for name, weight in weights.items()}
        for name, weight in weights.items():
            engine.log(f"weight/{name}", weight)
        return weights

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Move the means towards this step's losses; a loss that is not finite is left out."""
        keep = self.config.momentum
        for name, loss in engine.losses.items():
            size = engine.ranks.sum(loss).detach().abs().float()
            before = self._means.get(name, torch.zeros_like(size))
            finite = torch.isfinite(size)
            self._means[name] = torch.where(finite, keep * before + (1 - keep) * size, before)
            self._counts[name] = self._counts.get(name, 0) + 1

    def state_dict(self) -> StateDict:
        """The running means, and how many losses are in each."""
        return {"means": dict(self._means), "counts": dict(self._counts)}

    def load_state_dict(self, state: StateDict) -> None:
        """Take over the running means."""
        self._means = dict(cast(dict[str, Tensor], state["means"]))
        self._counts = dict(cast(dict[str, int], state["counts"]))

    def _mean(self, name: str) -> Tensor:
        return self._means[name] / (1 - self.config.momentum ** self._counts[name])
