"""The trainer object: an engine with two loaders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nexus_core import Batch, ConfigError, Engine, Plugin, Result
from nexus_plugins.classic.config import TrainingConfig

__all__ = ["NEXUSTrainer"]


class NEXUSTrainer:
    """Trains a model as configured, through plugins; `engine` is the underlying engine.

    Args:
        model: a `NEXUSCore` of the sizes in the config, or a module of your own that reports what
            the losses ask for; None builds the one that the config describes.
        config: the settings of the run.
        plugins: additional plugins, for what no field covers.

    Raises:
        ConfigError: the model's sizes differ from the config.
        PluginError: a field needs a plugin that is not installed.
    """

    def __init__(
        self, model: nn.Module | None, config: TrainingConfig, plugins: Iterable[Plugin[Any]] = ()
    ) -> None:
        # A given model determines the kind of its modules itself.
        kind = getattr(getattr(model, "config", None), "classic", config.classic)
        self.config = config = config.model_copy(update={"classic": kind})
        chosen = {plugin.name: plugin for plugin in (*config.plugins(), *plugins)}
        if model is None:
            model = _built(chosen["model_nexus"], config)
        elif hasattr(model, "hidden"):
            _check_sizes(model, config)
        else:
            del chosen["model_nexus"]
        self.engine = Engine(
            model,
            plugins=chosen.values(),
            seed=config.seed,
            device=config.device,
            accumulate=config.gradient_accumulation_steps,
            log_every=config.log_steps,
            out=config.output_dir,
        )

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.engine.model

    def train(
        self,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None = None,
        resume_from: str | Path | None = None,
    ) -> Result:
        """Train until `max_steps`, with evaluation, checkpoints and logs.

        Args:
            train_loader: batches; with `create_dataloader`, a resumed run is bitwise identical.
            val_loader: batches to evaluate on every `eval_steps` and at the end.
            resume_from: a checkpoint, or "auto": the newest good one in `output_dir`.

        Returns:
            How the run ended, and the final value of every metric.
        """
        if resume_from is not None:
            self.engine.resume(str(resume_from))
        return self.engine.fit(
            train_loader,
            until=self.config.max_steps,
            eval_data=val_loader,
            eval_every=self.config.eval_steps,
        )

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Measure every loss term, and perplexity, over all batches."""
        return self.engine.evaluate(loader)


def _built(plugin: Any, config: TrainingConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    # The plugin would only ask the engine for the vocabulary, which the config already has.
    model: nn.Module = plugin.make_model(engine=SimpleNamespace(data=None))
    return model


def _check_sizes(model: nn.Module, config: TrainingConfig) -> None:
    for name, wanted in config.model_settings().items():
        size = getattr(getattr(model, "config", None), name, wanted)
        if size != wanted:
            raise ConfigError(
                f"the model has {name}={size}, but the TrainingConfig says {wanted}; make them "
                "agree, or pass model=None to build the model from the config"
            )
