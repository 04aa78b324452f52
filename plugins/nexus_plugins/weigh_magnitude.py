"""Weights the loss terms so that all count equally, whatever their scale."""

from __future__ import annotations

from collections import ChainMap
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import Plugin, PluginConfig, StateDict, hookimpl

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["WeighMagnitudeConfig", "WeighMagnitudePlugin"]

TINY = 1e-12


class WeighMagnitudeConfig(PluginConfig):
    """Settings of weighing by magnitude."""

    momentum: float = Field(
        default=0.99, ge=0, lt=1, description="decay of the running mean per step"
    )
    total: Literal["terms", "one"] = Field(
        default="terms", description="sum of the weights: the number of terms, or one"
    )


class WeighMagnitudePlugin(Plugin[WeighMagnitudeConfig]):
    """Divides each loss term by the running mean of its magnitude.

    The mean is bias-corrected, as in Adam. A term's own `weight` is its share: twice the weight,
    twice the contribution to the total. A term without a finite loss so far uses its own weight.
    Weights are logged as `weight/<term>`.
    """

    config_class = WeighMagnitudeConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "weighing"
    _means: dict[str, Tensor]
    _filled: dict[str, Tensor]  # how far a mean has come from its start at zero, 0 to 1

    def __post_init__(self) -> None:
        self._means, self._filled = {}, {}

    @hookimpl
    def weigh_losses(self, engine: Engine, terms: tuple[str, ...]) -> dict[str, Tensor | float]:
        """The terms' weights in this step, from the losses of earlier steps."""
        own = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
        weights: dict[str, Tensor | float] = {name: own.get(name, 1.0) for name in terms}
        seen = {n: self._filled[n].to(engine.device) > 0 for n in terms if n in self._filled}
        raw = {name: own.get(name, 1.0) * there / self._mean(name) for name, there in seen.items()}
        if raw:
            count = reduce(add, (there.float() for there in seen.values()))
            scale = count / reduce(add, raw.values()).clamp(min=TINY)
            weights |= {n: torch.where(seen[n], raw[n] * scale, own.get(n, 1.0)) for n in seen}
        share = len(terms) if self.config.total == "one" else 1
        weights = {name: weight / share for name, weight in weights.items()}
        for name, weight in weights.items():
            engine.log(f"weight/{name}", weight)
        return weights

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        """Update the means with this step's losses; non-finite losses are skipped."""
        keep = self.config.momentum
        for name, loss in step.losses.items():
            size = engine.ranks.sum(loss).detach().abs().float()
            finite = torch.isfinite(size)
            mean = self._means.get(name, torch.zeros_like(size)).to(size.device)
            filled = self._filled.get(name, torch.zeros_like(size)).to(size.device)
            self._means[name] = torch.where(finite, keep * mean + (1 - keep) * size, mean)
            self._filled[name] = torch.where(finite, keep * filled + (1 - keep), filled)

    def state_dict(self) -> StateDict:
        """The running means, and the bias correction of each."""
        return {"means": dict(self._means), "filled": dict(self._filled)}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the running means."""
        self._means = dict(cast(dict[str, Tensor], state["means"]))
        self._filled = dict(cast(dict[str, Tensor], state["filled"]))

    def _mean(self, name: str) -> Tensor:
        """The corrected mean, kept away from zero; without meaning for an unseen term."""
        return (self._means[name] / self._filled[name].clamp(min=TINY)).clamp(min=TINY)
