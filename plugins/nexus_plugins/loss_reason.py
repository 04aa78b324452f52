"""The reasoner's loss: keeps every rule in use, on some tokens and not on others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nexus_core.plugin import StateDict, hookimpl
from nexus_plugins._shared.module_loss import (
    ModuleLoss,
    PositionLossConfig,
    real_positions,
    refuse_idle,
)

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine
    from nexus_core.step import Step

__all__ = ["LossReasonConfig", "LossReasonPlugin"]

DOUBT = 0.25
"""Weight of the entropy relative to the balance; with 1 or more, never firing would be optimal."""
TINY = 1e-6
"""Firing is clamped this far from 0 and 1, where the slope of the entropy is infinite."""
GRAIN = 2.0**20
"""Firing is summed in integer multiples of 1 / GRAIN, so that the order does not matter."""
EDGE = 1e-4
"""Rates are clamped this far from 0 and 1, which limits the gradient of unused rules."""

_OF_FORMULA = {True: ("entropy_weight", "eps"), False: ("balance_weight", "rate", "decay")}
"""Settings that only apply to the classic formula (True), or only to the default one."""


class LossReasonConfig(PositionLossConfig):
    """Settings of the reasoner's loss."""

    weight: float = Field(default=0.05, description="weight of this term in the total loss")
    classic: bool = Field(
        default=False, description="only the entropy of the rule distributions, weighted by halting"
    )
    balance_weight: float = Field(
        default=0.01, ge=0, description="weight of the load balance of the rules, summed over rules"
    )
    rate: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="target for how often a rule fires on average over tokens",
    )
    decay: float = Field(
        default=0.99, ge=0, lt=1, description="decay of the running average over past steps"
    )
    entropy_weight: float = Field(
        default=0.1, description="classic: weight of the entropy (nats) of the rule distributions"
    )
    eps: float = Field(
        default=1e-10, gt=0, description="classic: added to probabilities inside the logarithm"
    )

    @model_validator(mode="after")
    def _all_act(self) -> LossReasonConfig:
        refuse_idle(self, self.classic, _OF_FORMULA[not self.classic])
        return self


class LossReasonPlugin(ModuleLoss[LossReasonConfig]):
    """Trains the reasoner to use all of its rules, each on some tokens and not on others.

    The model reports `reason` `(B, T, R)`, how strongly each rule fired. The loss of a position is,
    summed over rules, `balance_weight` times `H(f) / 4 + KL(m, rate)`: H is the entropy, in nats,
    of firing f, on average over the steps, which is low where a rule always fires or never, and KL
    the divergence of m, how strongly the rule fired over the tokens of past steps, from `rate`; its
    gradient is passed to f, so that the loss stays a sum over tokens. A rule that always or never
    fires is pushed to change. Training also logs `reasoning/idle_rules`, how many rules fire on
    average less than a tenth of `rate`.

    Classic: the model reports `reason` `(B, T, K, R)`, a distribution over rules at each of K
    steps, and `reason_halting` `(B, T, K)`; a position costs `entropy_weight` times the entropy
    weighted by halting, on average over steps. It is least where one rule wins for all tokens.
    Training also logs `reasoning/proof_length`, the expected number of steps.

    Source: the balance follows the load-balancing losses of mixtures of experts (Shazeer et al.
    2017), on a running average as in Wang et al. 2024.
    """

    config_class = LossReasonConfig
    api_version: ClassVar[str] = "1.2"
    _rates: Tensor | None = None
    _fired: Tensor | None = None

    def units(self, batch: Batch) -> Tensor:
        """The number of positions, without padding."""
        return real_positions(batch, self.config.ignore_index).sum()

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum over positions."""
        reports, config = self.reports(output), self.config
        each = _entropy_of_choice(reports, config) if config.classic else self._each(reports)
        total: Tensor = (each * real_positions(batch, config.ignore_index)).sum()
        return total

    @hookimpl
    def loss_terms(  # type: ignore[override]  # hooks name what they use
        self, engine: Engine, batch: Batch, output: Any, step: Step | None
    ) -> dict[str, Tensor]:
        """The term `reason`; in training, record how strongly each rule fires."""
        if step is not None:
            reports, real = self.reports(output), real_positions(batch, self.config.ignore_index)
            if self.config.classic:
                length = _proof_length(reports["reason_halting"].detach())
                engine.log("reasoning/proof_length", (length * real).sum(), units=real.sum())
            else:
                if step.place == 0:  # a repeated pass counts once
                    self._fired = None
                counts = real & (not step.micro[step.place].borrowed)
                self._note(reports["reason"].detach() * counts.unsqueeze(-1))
        return {self.term: self.loss(batch, output)}

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        """Update the running averages of rule firing."""
        if self._fired is None:
            return
        fired = engine.ranks.sum(self._fired).to(torch.float32) / (GRAIN * step.units[self.term])
        kept = self.config.decay if self._rates is not None else 0.0
        self._rates = fired + kept * (self._rates_like(fired) - fired)
        self._fired = None
        engine.log("reasoning/idle_rules", (self._rates < self.config.rate / 10).sum())

    def state_dict(self) -> StateDict:
        """The running average of each rule's firing."""
        return {} if self._rates is None else {"rates": self._rates}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the averages."""
        self._rates, self._fired = cast("Tensor | None", state.get("rates")), None

    def _each(self, reports: Mapping[str, Tensor]) -> Tensor:
        """The loss of each position."""
        firing, config = reports["reason"].clamp(TINY, 1 - TINY), self.config
        rates = self._rates_like(firing).clamp(EDGE, 1 - EDGE)
        pull = rates.logit() - math.log(config.rate / (1 - config.rate))
        doubt: Tensor = torch.special.entr(firing) + torch.special.entr(1 - firing)
        far = rates * pull - ((1 - config.rate) / (1 - rates)).log()  # from the target rate
        balance = DOUBT * doubt + far + (firing - firing.detach()) * pull
        return config.balance_weight * balance.sum(-1)

    def _rates_like(self, firing: Tensor) -> Tensor:
        """The average of each rule before this step; `rate` in the first step."""
        if self._rates is None:
            return firing.new_full(firing.shape[-1:], self.config.rate)
        self._rates = self._rates.to(firing.device)
        return self._rates

    def _note(self, firing: Tensor) -> None:
        whole = (firing * GRAIN).round().long().flatten(0, -2).sum(0)
        self._fired = whole if self._fired is None else self._fired + whole


def _proof_length(halting: Tensor) -> Tensor:
    """The expected number of steps of each position."""
    return (halting * torch.arange(1, halting.shape[-1] + 1, device=halting.device)).sum(-1)


def _entropy_of_choice(reports: Mapping[str, Tensor], config: LossReasonConfig) -> Tensor:
    rules, halting = reports["reason"], reports["reason_halting"]
    entropy = -(rules * (rules + config.eps).log()).sum(-1)
    each: Tensor = config.entropy_weight * (halting * entropy).mean(-1)
    return each
