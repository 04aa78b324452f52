"""A Hugging Face causal language model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import ConfigDict, Field
from torch import nn

from nexus_core.errors import CheckpointError, ConfigError, hint_add, hint_set
from nexus_core.plugin import Plugin, PluginConfig, StateDict, hookimpl
from nexus_plugins_contrib.model_hf import loading, passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["FOLDER", "ModelHfConfig", "ModelHfPlugin"]

FOLDER = "huggingface"  # in the run folder: what an export needs besides weights
_EXAMPLE: Any = {"path": "Qwen/Qwen3-0.6B"}
_log = logging.getLogger(__name__)


class ModelHfConfig(PluginConfig):
    """Which model to use, and how to load and run it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})
    path: str = Field(min_length=1, description="folder of a model, or its id on the hub")
    revision: str | None = Field(
        default=None, description="commit, tag or branch on the hub; null: the current main branch"
    )
    weights: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="'pretrained', or 'random': only the architecture, initialized with the run's "
        "seed",
    )
    config: dict[str, Any] = Field(
        default={}, description="overrides of the model's configuration, such as dropouts"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="dtype of the weights; 'auto': as stored"
    )
    attention: str | None = Field(
        default=None,
        description="attention implementation of transformers: 'sdpa', 'eager', ...; null: its "
        "default",
    )
    logits: Literal["auto", "full"] = Field(
        default="auto",
        description="'auto': avoid full logits if the result is the same; 'full': always compute "
        "them",
    )
    quantize: loading.Quantized | None = Field(
        default=None, description="load the frozen weights in 4 bits (bitsandbytes); for adapters"
    )


class ModelHfPlugin(Plugin[ModelHfConfig]):
    """Trains a causal language model from transformers, by default without full logits.

    Only safetensors are read, and a model's own code is never run. Whether the loss can skip the
    full logits, and how documents in a packed row are isolated, is determined by a check on the
    first batch, and reported in the summary.
    """

    config_class = ModelHfConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "model"

    def __post_init__(self) -> None:
        self._commit: str | None = None
        self._headless: bool | None = None
        self._full_because: str | None = None
        self._rows: passes.Rows | None = None
        self._has_tokenizer = True

    @hookimpl
    def make_model(self, engine: Engine) -> nn.Module:
        """Load it, or build it with random weights.

        Raises:
            ConfigError: it cannot be loaded with these settings.
        """
        settings = self.config
        self._check_quantized(engine)
        origin = loading.pinned(loading.origin_of(settings.path, settings.revision))
        self._commit = origin.revision
        if self._commit is not None:  # lock.json records the settings, with the pinned commit
            self.config = settings.model_copy(update={"revision": self._commit})
        config = loading.read_config(origin, settings.config)
        if settings.weights == "random" or torch.get_default_device().type == "meta":
            model = loading.build(config, settings.dtype, settings.attention)
        else:
            chosen = (settings.dtype, settings.attention, settings.quantize, engine.device)
            model = loading.load(origin, config, *chosen)
        nn.Module.train(model)  # pretrained models come in evaluation mode
        return model

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Save the configuration and the tokenizer with the run, for export."""
        if engine.out is None or not engine.ranks.is_main or (engine.out / FOLDER).exists():
            return
        origin = loading.origin_of(self.config.path, self.config.revision)
        model = cast("PreTrainedModel", engine.model)
        self._has_tokenizer = _keep(model, origin, engine.out / FOLDER)

    @hookimpl
    def forward(self, engine: Engine, batch: Batch) -> Any:
        """Run the model over `input_ids` `(B, T)`.

        `attention_mask` `(B, T)` marks padding by 0. Where `segment_ids` `(B, T)` change, a new
        document starts, which does not see the previous one; its positions start at 0.

        Returns:
            Hidden states and the head's weight, or logits `(B, T, V)`.
        """
        model = cast("PreTrainedModel", engine.model)
        inputs = passes.Inputs(
            batch["input_ids"], batch.get("attention_mask"), batch.get("segment_ids")
        )
        if self._headless is None:
            self._settle_logits(model, inputs)
        if self._rows is None and inputs.segments is not None:
            self._rows = passes.find_rows(model, inputs.ids)
        return passes.run(model, inputs, headless=bool(self._headless), rows=self._rows)

    @hookimpl
    def summarize(self) -> dict[str, str]:
        """Report the result of the check."""
        lines = [f"full logits: {self._full_because}"] if self._full_because else []
        if self._rows == "unpacked":
            lines.append("packed rows: each document is run as its own row")
        if not self._has_tokenizer:
            lines.append("no tokenizer next to the model: an export will have none")
        return {"model_hf": "\n".join(lines)} if lines else {}

    def state_dict(self) -> StateDict:
        """The Hub commit, and the result of the check."""
        found: StateDict = {"commit": self._commit, "rows": self._rows}
        return {**found, "headless": self._headless, "because": self._full_because}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the result of the check, and reject another commit."""
        commit = state["commit"]
        if commit is not None and self._commit is not None and commit != self._commit:
            raise CheckpointError(
                f"the checkpoint began at commit {commit} of '{self.config.path}', but this run "
                f"loaded {self._commit}; pin it: ",
                hint_set("model_hf.revision", commit),
            )
        self._headless = cast("bool | None", state["headless"])
        self._full_because = cast("str | None", state["because"])
        self._rows = cast("passes.Rows | None", state["rows"])

    def _settle_logits(self, model: PreTrainedModel, inputs: passes.Inputs) -> None:
        if self.config.logits == "full":
            self._headless = False
            return
        self._full_because = passes.full_logits_because(model, inputs.ids)
        self._headless = self._full_because is None
        if self._full_because:
            _log.info("model_hf: using full logits, because %s", self._full_because)

    def _check_quantized(self, engine: Engine) -> None:
        if self.config.quantize is None:
            return
        if self.config.weights == "random":
            raise ConfigError("model_hf.quantize is for pretrained weights; remove one of them")
        if "fsdp" in engine.plugins and engine.ranks.size > 1:
            raise ConfigError(
                "model_hf.quantize: fsdp cannot shard 4-bit weights; use ddp, or remove quantize"
            )
        if "peft" not in engine.plugins:
            raise ConfigError(
                "model_hf.quantize: quantized weights cannot be trained; train adapters on them: ",
                hint_add("peft"),
            )


def _keep(model: PreTrainedModel, origin: loading.Origin, folder: Path) -> bool:
    """Save configuration, generation settings and tokenizer; False: there is no tokenizer."""
    from transformers import AutoTokenizer

    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            origin.place, revision=origin.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        _log.info("model_hf: no tokenizer in '%s': %s", origin.place, " ".join(str(error).split()))
        return False
    tokenizer.save_pretrained(folder)
    return True
