"""Preference training: of two answers, the chosen one becomes more likely."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus_core import ConfigError, Loss, LossConfig, hookimpl
from nexus_core.errors import CheckpointError, hint_add
from nexus_plugins._shared.alignment import check_alignment
from nexus_plugins._shared.other_models import (
    at_rest,
    forward_of,
    has_adapters,
    weights_hash,
    without_adapters,
)
from nexus_plugins._shared.token_losses import token_nats
from nexus_plugins.loss_dpo.pairs import SIDES, Pairs, check_answers, join, margins

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine
    from nexus_core.plugin import StateDict
    from nexus_core.step import Step

__all__ = ["LossDpoConfig", "LossDpoPlugin"]


class LossDpoConfig(LossConfig):
    """Settings of the preference loss."""

    variant: Literal["sigmoid", "robust", "hinge", "ipo"] = Field(
        default="sigmoid", description="loss as a function of a pair's margin"
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="strength of the KL constraint: lower lets the model move further from the "
        "reference",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="assumed share of pairs with flipped preferences"
    )
    reference: Literal["auto", "adapters", "copy", "none"] = Field(
        default="auto",
        description="'adapters': the model with its adapters disabled; 'copy': a frozen copy of "
        "the initial model; 'auto': the first that is possible; 'none': no reference",
    )
    ignore_index: int = Field(default=-100, description="label of ignored positions")


class LossDpoPlugin(Loss[LossDpoConfig]):
    """Trains on pairs of answers: the chosen one's margin relative to a reference model.

    A batch has `chosen_input_ids` and `chosen_labels` `(B, T)`, with `chosen_attention_mask` if
    rows are padded, and the same for `rejected`; labels are the next tokens. A pair is one unit.
    Training also logs `dpo/accuracy`, `dpo/margin` and the rewards of both sides.

    Source: Rafailov et al. 2023 (sigmoid), with the smoothing of Mitchell 2023; Chowdhury et al.
        2024 (robust); Zhao et al. 2023, SLiC (hinge); Azar et al. 2023 (ipo), whose
        log-probabilities are means over tokens.
    """

    config_class = LossDpoConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.label_smoothing and self.config.variant in ("hinge", "ipo"):
            raise ConfigError(
                f"loss_dpo.label_smoothing is for the variants sigmoid and robust, but this one is "
                f"'{self.config.variant}'; change one of them"
            )
        self._copy: nn.Module | None = None
        self._hash = ""
        self._is_aligned = False

    @hookimpl
    def on_build(self, engine: Engine) -> None:
        """Copy the model before training, unless disabling its adapters serves as the reference.

        Raises:
            ConfigError: adapters should be disabled, but there are none.
        """
        wanted = self.config.reference
        adapted = has_adapters(engine.model)
        if wanted == "adapters" and not adapted:
            raise ConfigError(
                "loss_dpo.reference is 'adapters', but the model has none; add them: ",
                hint_add("peft"),
            )
        if wanted == "copy" or (wanted == "auto" and not adapted):
            self._copy = copy.deepcopy(engine.model).requires_grad_(False).eval()
            self._hash = weights_hash(self._copy)

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Check that the copy still equals the run's initial model.

        Raises:
            ConfigError: weights were loaded after the copy; a resumed run could not repeat that.
        """
        if self._copy is None or engine.state.step > 0 or self._hash == weights_hash(engine.model):
            return
        raise ConfigError(
            "loss_dpo.reference: weights were loaded after the model was built, so a resumed run "
            "could not copy them; load them with the model, or train adapters, which can be "
            "disabled: ",
            hint_add("peft"),
        )

    @hookimpl(stage="context")
    def forward(self, engine: Engine, batch: Batch, step: Step | None) -> Pairs | None:
        """Run model and reference over both answers of each pair at once."""
        if "chosen_input_ids" not in batch:
            return None
        joined = join(batch, self.config.ignore_index)
        before = self._reference(engine, joined, step)
        now = self._log_probabilities(
            engine.hook.forward(engine=engine, batch=joined, step=step), joined["labels"]
        )
        return Pairs(*now.chunk(2), *before.chunk(2))

    def units(self, batch: Batch) -> float:
        """The number of pairs.

        Raises:
            DataError: an answer of the pairs has no label.
        """
        if not self._is_aligned:
            for side in SIDES:
                check_alignment(batch, self.config.ignore_index, f"{side}_")
            self._is_aligned = True
        for side in SIDES:
            check_answers(batch[f"{side}_labels"], f"{side}_labels", self.config.ignore_index)
        return float(len(batch["chosen_input_ids"]))

    def loss(self, batch: Batch, output: Pairs) -> Tensor:
        """The loss of each pair, summed."""
        return self.of_margins(margins(output)).sum()

    def of_margins(self, margin: Tensor) -> Tensor:
        """The loss of pairs, given their margins."""
        beta, wrong = self.config.beta, self.config.label_smoothing
        if self.config.variant == "ipo":
            return (margin - 1 / (2 * beta)).square()
        if self.config.variant == "hinge":
            return F.relu(1 - beta * margin)
        right, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        if self.config.variant == "robust":
            return ((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)
        return (1 - wrong) * right + wrong * flipped

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Pairs) -> dict[str, Tensor]:
        """The term `dpo`, and metrics of the pairs."""
        margin, pairs, beta = margins(output).detach(), float(len(output.chosen)), self.config.beta
        chosen = (output.chosen - output.chosen_reference).detach()
        engine.log("dpo/accuracy", (margin > 0).float().sum(), units=pairs)
        engine.log("dpo/margin", beta * margin.sum(), units=pairs)
        engine.log("dpo/chosen_reward", beta * chosen.sum(), units=pairs)
        engine.log("dpo/rejected_reward", beta * (chosen - margin).sum(), units=pairs)
        loss = self.loss(batch, output)
        if not engine.training:
            engine.log("loss", loss, units=pairs)
        return {self.term: loss}

    def state_dict(self) -> StateDict:
        """The identity of the reference, so that a resumed run uses the same."""
        return {"reference": self._hash}

    def load_state_dict(self, state: StateDict) -> None:
        """Reject another reference.

        Raises:
            CheckpointError: the model is built with different weights.
        """
        if state["reference"] != self._hash:
            raise CheckpointError(
                f"loss_dpo: the reference was a copy of other weights (hash {state['reference']}, "
                f"now {self._hash or 'none'}); use the model that the run started from"
            )

    def _reference(self, engine: Engine, joined: dict[str, Tensor], step: Step | None) -> Tensor:
        """The reference's log-probabilities of both answers, `(2B,)`."""
        if self.config.reference == "none":
            return joined["labels"].new_zeros(len(joined["labels"]), dtype=torch.float32)
        model = engine.model if self._copy is None else self._copy
        switched = without_adapters(model) if self._copy is None else nullcontext()
        with at_rest(model), switched:
            output = forward_of(engine, model, joined, step)
            return self._log_probabilities(output, joined["labels"])

    def _log_probabilities(self, output: Any, labels: Tensor) -> Tensor:
        total = -token_nats(output, labels, self.config.ignore_index).sum(1)
        if self.config.variant != "ipo":
            return total
        return total / (labels != self.config.ignore_index).sum(1)
