"""Trains adapters on frozen weights, and saves only the adapters."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from nexus_core.errors import CheckpointError, ConfigError
from nexus_core.paths import PathField
from nexus_core.plugin import Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.processes import gather
from nexus_core.signatures import Several
from nexus_core.snapshot import Snapshot
from nexus_plugins._shared.calls import Arguments
from nexus_plugins._shared.other_models import weights_hash
from nexus_plugins.init.source import read_weights
from nexus_plugins_contrib.peft import adapters

if TYPE_CHECKING:
    from peft import PeftConfig as Settings
    from peft.tuners.tuners_utils import BaseTuner

    from nexus_core.engine import Engine

__all__ = ["PeftConfig", "PeftPlugin"]

_RANK = 8  # default rank of methods that have one


class PeftConfig(PluginConfig):
    """Which adapters to train, and where to insert them."""

    method: str = Field(
        default="lora",
        description="peft method, in lower case: lora, loha, lokr, ia3, oft, vera...",
    )
    r: int | None = Field(
        default=None, ge=1, description="rank; null: the method's default (LoRA: 8)"
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="scale, divided by the rank in LoRA; null: the method's default",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="dropout; null: the method's default (LoRA: 0)"
    )
    target: Several[str] = Field(
        default=(),
        description="patterns of module names; none: every linear layer except the output layer "
        "and those with fewer inputs or outputs than the rank",
    )
    args: Arguments = Field(
        default={}, description="further arguments of the peft config class, such as use_dora"
    )
    adapter: PathField | None = Field(
        default=None,
        description="folder of saved adapters (from peft or an export) to start from; replaces "
        "method, r, alpha, dropout, target and args",
        json_schema_extra={"resume": "locked"},
    )
    base: PathField | None = Field(
        default=None,
        description="base weights, if the model's plugin loads none: a run, a checkpoint, an "
        "export or safetensors",
    )

    @model_validator(mode="after")
    def _acts(self) -> Self:
        own = {"method", "r", "alpha", "dropout", "target", "args"}
        fields = type(self).model_fields
        idle = sorted(name for name in own if getattr(self, name) != fields[name].default)
        if self.adapter is not None and idle:
            raise ValueError(
                f"{idle[0]} has no effect with adapter, whose folder sets it; remove one of them "
                "(r and alpha of a preset: null)"
            )
        return self


class PeftPlugin(Plugin[PeftConfig]):
    """Freezes the model and trains adapters in it: LoRA and similar methods, on any model.

    A checkpoint has only the adapters, with a hash of the base weights, which must be the same on
    resume.

    Source: Hu et al. 2022, "LoRA"; the methods are those of the package peft.
    """

    config_class = PeftConfig
    api_version: ClassVar[str] = "1.2"
    conflicts: ClassVar[tuple[str, ...]] = ("init",)  # its weights would be lost on resume
    before: ClassVar[tuple[str, ...]] = ("fsdp",)  # which shards what it finds

    def __post_init__(self) -> None:
        self.tuner: BaseTuner | None = None
        self._below: set[str] = set()  # names of base weights, which checkpoints omit
        self._hash = ""
        self._looked = False

    @hookimpl(wrapper=True, trylast=True)
    def make_model(self, engine: Engine) -> Generator[None, nn.Module, nn.Module]:
        """Insert the adapters as soon as the model is built, before others shard it."""
        model = yield
        self._adapt_alike(model, engine)
        return model

    @hookimpl(wrapper=True)
    def make_optimizer(self, engine: Engine) -> Generator[None, Optimizer, Optimizer]:
        """Insert them into a model passed by the program, before the optimizer is built."""
        if self.tuner is None:
            self._adapt_alike(engine.model, engine)
        return (yield)

    @hookimpl
    def on_build(self) -> None:
        """Check that adapters have been inserted.

        Raises:
            ConfigError: the program passed an optimizer, built before the adapters existed.
        """
        if self.tuner is None:
            raise ConfigError(
                "peft adds adapters to the model before its optimizer is created; leave the "
                "optimizer to a plugin: Engine(model, plugins=[..., OptimAdamwPlugin()])"
            )

    def adapt(self, model: nn.Module) -> BaseTuner:
        """Freeze a model and insert the adapters.

        Raises:
            ConfigError: the settings do not fit the method or the model.
            CheckpointError: the weights of `base` do not fit the model.
        """
        config = self.config
        is_empty = any(parameter.is_meta for parameter in model.parameters())
        if config.base is not None and not is_empty:
            _fill(model, config.base)
        self._hash = "" if is_empty else weights_hash(model)
        self.tuner = adapters.inject(model, self._settings(model))
        if config.adapter is not None:
            adapters.begin_with(self.tuner, model, config.adapter)
            self._hash = "" if is_empty else weights_hash(model)
        self._below = adapters.frozen_names(model)
        adapters.hide_quantization(model)
        return self.tuner

    def _settings(self, model: nn.Module) -> Settings:
        config = self.config
        if config.adapter is not None:
            return adapters.settings_in(config.adapter)
        targets = adapters.targets_of(model, config.target, config.r or _RANK)
        own = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout}
        return adapters.settings_of(config.method, own, config.args, targets)

    def _adapt_alike(self, model: nn.Module, engine: Engine) -> None:
        """Adapt a model; of a sharded one, only rank 0 has the weights."""
        self.adapt(model)
        self._hash = gather(engine.ranks, self._hash)[0]

    @hookimpl(stage="inspect")
    def after_backward(self, engine: Engine) -> None:
        """After the first gradient, warn about adapters that the loss does not reach."""
        if self._looked:
            return
        self._looked = True
        trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        idle = [name for name, parameter in trained.items() if parameter.grad is None]
        if idle and engine.ranks.is_main:
            warnings.warn(
                f"peft: the loss does not reach {len(idle)} of {len(trained)} trained tensors, "
                f"such as {idle[0]}; the model may read a layer's weight without calling the "
                "layer: exclude it from peft.target",
                RuntimeWarning,
                stacklevel=2,
            )

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """From now on, keep weights that were unfrozen in checkpoints."""
        if len(self._below) > len(now := adapters.frozen_names(engine.model) & self._below):
            self._below = now

    @hookimpl
    def on_save(self, snapshot: Snapshot) -> None:
        """Omit the base weights from the checkpoint."""
        model = snapshot["model"]
        for name in [name for name in model if name in self._below]:
            del model[name]

    @hookimpl
    def on_load(self, engine: Engine, snapshot: Snapshot) -> None:
        """Fill in the base weights, as loaded in this run."""
        saved, own = snapshot["model"], engine.model.state_dict()
        for name in own:
            if name not in saved and name in self._below:
                saved[name] = own[name]
        self._below = {
            name for name in self._below if name not in saved or saved[name] is own[name]
        }

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Say how much of the model was trained."""
        named = list(engine.model.parameters())
        trained = sum(p.numel() for p in named if p.requires_grad)
        whole = sum(p.numel() for p in named)
        return {"adapters": f"{trained:,} of {whole:,} numbers ({trained / whole:.2%})"}

    def state_dict(self) -> StateDict:
        """The identity of the base weights, so that adapters are not loaded on others."""
        return {"base": self._hash, "looked": self._looked}

    def load_state_dict(self, state: StateDict) -> None:
        """Reject different base weights.

        Raises:
            CheckpointError: the adapters were trained on others.
        """
        if state["base"] != self._hash:
            raise CheckpointError(
                f"peft: the adapters were trained on other weights (hash {state['base']}, but "
                f"{self._hash} here); use the model that the run started from"
            )
        self._looked = bool(state["looked"])


def _fill(model: nn.Module, source: Path) -> None:
    """Load all weights of a model; tied ones may have a single name."""
    weights = read_weights(source, ema=False)
    own = model.state_dict(keep_vars=True)
    given = {id(own[name]) for name in weights.tensors if name in own}
    missing = [name for name, tensor in own.items() if id(tensor) not in given]
    odd = [name for name in weights.tensors if name not in own]
    if missing or odd:
        name, where = (missing[0], weights.origin) if missing else (odd[0], "the model")
        raise CheckpointError(f"peft.base: {where} has no '{name}'; give weights of this model")
    try:
        model.load_state_dict(weights.tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"peft.base: {' '.join(str(error).split())[:300]}") from error
