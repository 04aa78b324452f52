"""AdamW that averages instead of following a schedule."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_core import ConfigError, Plugin, StateDict, hookimpl
from nexus_core.signatures import Lax
from nexus_plugins._shared.parameters import OptimizerConfig, groups_of

if TYPE_CHECKING:
    from nexus_core import Engine, Snapshot

__all__ = ["OptimSchedulefreeConfig", "OptimSchedulefreePlugin"]


class OptimSchedulefreeConfig(OptimizerConfig):
    """Settings of Schedule-Free AdamW."""

    lr: float = Field(
        default=2.5e-3, gt=0, description="learning rate; higher than with a schedule"
    )
    betas: Lax[tuple[float, float]] = Field(
        default=(0.9, 0.999),
        description="weight of the average in the point where the gradient is taken; decay rate "
        "of the running mean of the squared gradient",
    )
    eps: float = Field(
        default=1e-8, gt=0, description="term added to the denominator for numerical stability"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warmup")
    r: float = Field(
        default=0.0,
        ge=0,
        description="weight later steps in the average by this power of their index",
    )


class OptimSchedulefreePlugin(Plugin[OptimSchedulefreeConfig]):
    """Trains with Schedule-Free AdamW: no learning rate decay, no known horizon needed.

    Gradients are taken at one set of weights (`y`), and another (`x`), their average, is the
    model. Evaluation and saved models use `x`; the weights `y` are restored bitwise, and are saved
    with the plugin's state, so that a resumed run is exact. Decaying schedules are rejected; use
    `lr_constant` for warmup.

    Source: Defazio et al. 2024, "The Road Less Scheduled"; `schedulefree.AdamWScheduleFree`.
    """

    config_class = OptimSchedulefreeConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "optimizer"
    conflicts: ClassVar[tuple[str, ...]] = (
        "ema",  # would average the same weights again
        "lr_cosine",
        "lr_linear",
        "lr_rsqrt",
        "lr_torch",
        "lr_wsd",
    )
    _optimizer: Any = None  # the package has no types
    _model: nn.Module
    _training_weights: dict[str, Tensor] | None = None  # copies, while the model has `x`

    @hookimpl
    def make_optimizer(self, engine: Engine) -> Optimizer:
        """Build the optimizer over the model's parameters, grouped by pattern and weight decay.

        Raises:
            ConfigError: schedulefree is not installed, or a pattern matches no parameter.
        """
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise ConfigError(
                f"optim_schedulefree needs schedulefree, which cannot be imported ({error}); "
                "install it: pip install 'nexus-trainer[schedulefree]'"
            ) from error
        config = self.config
        made = AdamWScheduleFree(
            groups_of(engine.model, config, self.name),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            r=config.r,
        )
        made.train()
        self._optimizer, self._model = made, engine.model
        return cast(Optimizer, made)

    @hookimpl
    def on_start(self) -> None:
        """Restore the training weights, if the run is resumed."""
        self._bring_back()

    @hookimpl(stage="settle")
    def on_finish(self) -> None:
        """Leave the average in the model, as the result of the run."""
        self._show_average()

    @hookimpl
    def on_save(self, engine: Engine, snapshot: Snapshot) -> None:
        """Put the average into the snapshot's model, and its optimizer into training mode."""
        shown = self._training_weights is not None
        self._bring_back()
        snapshot["optimizer"] = engine.optimizer.state_dict()
        snapshot["plugins"][self.name] = {
            "version": self.state_version,
            "state": {"training_weights": cast(StateDict, self._weights())},
        }
        self._show_average()
        snapshot["model"] = copy.deepcopy(dict(engine.model.state_dict()))
        if not shown:
            self._bring_back()

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        """Replace the saved average by the training weights."""
        self._training_weights = None
        saved = cast(dict[str, Tensor], state["training_weights"])
        for name, weight in self._weights().items():
            weight.copy_(saved[name])

    def _weights(self) -> dict[str, Tensor]:
        named = self._model.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    def _show_average(self) -> None:
        if self._training_weights is None and self._optimizer is not None:
            self._training_weights = {n: weight.clone() for n, weight in self._weights().items()}
            self._optimizer.eval()

    @torch.no_grad()
    def _bring_back(self) -> None:
        if self._training_weights is not None and self._optimizer is not None:
            self._optimizer.train()
            for name, weight in self._weights().items():
                weight.copy_(self._training_weights[name])  # `train` restores them approximately
            self._training_weights = None
