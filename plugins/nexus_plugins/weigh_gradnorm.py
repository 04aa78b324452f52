"""Balances loss terms by their gradient norms on shared weights and their learning speed."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus_core import ConfigError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.cells import CellSum
from nexus_core.processes import Ranks
from nexus_core.signatures import Several
from nexus_plugins._shared.parameters import matching
from nexus_plugins._shared.term_gradients import Gradient, add_term_gradients, trunk_products

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["WeighGradnormConfig", "WeighGradnormPlugin"]

TINY = 1e-12


class WeighGradnormConfig(PluginConfig):
    """Settings of GradNorm."""

    alpha: float = Field(
        default=1.5, ge=0, description="how much slower-learning terms are favoured; 0: not at all"
    )
    lr: float = Field(
        default=0.1, gt=0, le=1, description="share of the way to balance per update, in log space"
    )
    every: int = Field(
        default=10, ge=1, description="steps between updates; each costs one backward pass per term"
    )
    shared: Several[str] = Field(
        default=(),
        description="patterns of the shared parameters; none: those that the most terms reach",
    )


class WeighGradnormPlugin(Plugin[WeighGradnormConfig]):
    """Balances the terms' gradient norms on the weights that they share.

    Each term's gradient norm is moved towards the mean norm, times its relative inverse training
    rate to the power `alpha` (1 for a term that started at zero or below), times its own `weight`.
    The weights sum to the number of terms and are logged as `weight/<term>`. A term whose gradient
    is zero or not finite keeps its weight, and the others are balanced among themselves. A term
    that does not depend on the shared weights, or has no weight above zero, keeps its own.

    Source: Chen et al. 2018, "GradNorm", algorithm 1. Deviation: the paper descends on the
    distance to the target in the weights, which may turn them negative; here their logarithms
    move part of the way to the same fixed point, so widely different scales balance as quickly.
    """

    config_class = WeighGradnormConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "weighing"
    _weights: dict[str, Tensor]
    _first_losses: dict[str, Tensor]
    _gradients: dict[str, Gradient]
    _cells: CellSum | None = None

    def __post_init__(self) -> None:
        self._weights, self._first_losses, self._gradients = {}, {}, {}

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Find the parameters that may be shared; a pattern that matches nothing is an error."""
        self._chosen(engine)

    def _chosen(self, engine: Engine) -> list[nn.Parameter]:
        named = dict(engine.model.named_parameters())
        chosen = {
            name
            for pattern in self.config.shared
            for name in matching(named, pattern, f"{self.name}.shared")
        }
        return [p for n, p in named.items() if n in (chosen or named) and p.requires_grad]

    @hookimpl
    def weigh_losses(self, engine: Engine, terms: tuple[str, ...]) -> dict[str, Tensor | float]:
        """The terms' weights in this step: the configured ones until the first update."""
        own = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
        weights: dict[str, Tensor | float] = {name: own.get(name, 1.0) for name in terms}
        known = [name for name in terms if name in self._weights and own.get(name, 1.0) > 0]
        weights |= {name: self._weights[name] for name in known}
        for name, weight in weights.items():
            engine.log(f"weight/{name}", weight)
        return weights

    @hookimpl(wrapper=True)
    def backward(
        self, engine: Engine, terms: Mapping[str, Tensor], step: Step
    ) -> Generator[None, bool, bool]:
        """If an update is due, compute each term's gradient before the combined backward pass."""
        if (step.number - 1) % self.config.every == 0 and not step.again:
            own = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
            on = {name: term for name, term in terms.items() if own.get(name, 1.0) > 0}
            before = self._gradients if step.place and not step.cells else {}
            self._gradients = add_term_gradients(before, on, self._chosen(engine))
            if step.cells:
                self._add_cell(engine, step)
        return (yield)

    def _add_cell(self, engine: Engine, step: Step) -> None:
        """Add the current cell's gradients, concatenated over terms, to the sum over cells."""
        micro, chosen = step.micro[step.place], self._chosen(engine)
        if self._cells is None or step.place == 0:
            self._cells = CellSum(sum(step.cells), [p for _ in step.units for p in chosen])
        if micro.cell is not None and not micro.borrowed:
            absent: Gradient = [None] * len(chosen)
            found = [self._gradients.get(name, absent) for name in step.units]
            self._cells.add(
                micro.cell, [None if p is None else p.clone() for parts in found for p in parts]
            )

    def _of_cells(self, engine: Engine, step: Step, part: CellSum) -> dict[str, Gradient]:
        """The gradient over all cells, for each term that has one."""
        total = engine.hook.sum_cells(engine=engine, step=step, part=part)
        size = len(total) // len(step.units)
        parts = [total[place * size : (place + 1) * size] for place in range(len(step.units))]
        found = dict(zip(step.units, parts, strict=True))
        return {n: parts for n, parts in found.items() if any(p is not None for p in parts)}

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        """Move the weights towards balance."""
        gradients, self._gradients = self._gradients, {}
        if self._cells is not None:
            gradients = self._of_cells(engine, step, self._cells)
            self._cells = None
        if len(gradients) < 2:
            return
        if not step.cells:
            gradients = {name: _of_all(parts, engine.ranks) for name, parts in gradients.items()}
        names, products = trunk_products(gradients)
        if not names:
            raise ConfigError(
                "weigh_gradnorm: no parameter is reached by two loss terms; use weigh_magnitude"
            )
        losses = engine.ranks.sum(torch.stack([step.losses[n].detach().float() for n in names]))
        own = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
        one = torch.ones_like(losses[0])  # puts a number on the device without a sync
        for name, loss in zip(names, losses, strict=True):
            first = self._first_losses.get(name, loss) * one
            self._first_losses[name] = torch.where(torch.isfinite(first), first, loss)
        first = torch.stack([self._first_losses[name] for name in names])
        shares = torch.stack([own.get(name, 1.0) * one for name in names])
        now = torch.stack([self._weights.get(n, own.get(n, 1.0)) * one for n in names])
        rates = torch.where(first > 0, (losses / first).clamp(min=TINY), 1.0)
        weights = self._balanced(now, products.diagonal().sqrt(), rates, shares)
        self._weights |= dict(zip(names, weights.unbind(), strict=True))

    def _balanced(self, now: Tensor, norms: Tensor, rates: Tensor, shares: Tensor) -> Tensor:
        """The weights `(terms,)` after an update; terms without a usable gradient keep theirs."""
        now = now * (len(now) / now.sum())
        pulls = torch.isfinite(norms) & (norms > 0) & torch.isfinite(rates)
        mean_norm, mean_rate = (torch.where(pulls, x, torch.nan).nanmean() for x in (norms, rates))
        targets = mean_norm * (rates / mean_rate) ** self.config.alpha * shares
        moved = now * (targets / norms) ** self.config.lr
        pulls = pulls & torch.isfinite(moved) & (moved > 0)
        before, after = (torch.where(pulls, x, 0.0).sum() for x in (now, moved))
        return torch.where(pulls, moved * (before / after), now)

    def state_dict(self) -> StateDict:
        """Weights and first losses by term."""
        return {"weights": dict(self._weights), "first_losses": dict(self._first_losses)}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore weights and first losses."""
        self._weights = dict(cast(dict[str, Tensor], state["weights"]))
        self._first_losses = dict(cast(dict[str, Tensor], state["first_losses"]))


def _of_all(gradient: Gradient, ranks: Ranks) -> Gradient:
    """A term's gradient summed over all ranks, in one exchange."""
    there = [part.float() for part in gradient if part is not None]
    if ranks.size == 1 or not there:
        return gradient
    whole = ranks.sum(torch.cat([part.reshape(-1) for part in there]))
    sizes = [part.numel() for part in there]
    parts = iter([w.view_as(p) for w, p in zip(torch.split(whole, sizes), there, strict=True)])
    return [None if part is None else next(parts) for part in gradient]
