"""The NEXUS model as a plugin."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus_core.errors import ConfigError, DataError, hint_set
from nexus_core.places import used
from nexus_core.plugin import Plugin, StateDict, hookimpl
from nexus_core.processes import is_sharded
from nexus_plugins._shared.texts import harmless
from nexus_plugins.model_nexus.causal import CausalModule
from nexus_plugins.model_nexus.nexus import NEXUSConfig, NEXUSCore, NEXUSOutput

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["ModelNexusConfig", "ModelNexusPlugin"]

BYTES = 256
_OF_BYTES = "; for plain bytes with 256 ids, set data_text.tokenizer=bytes256"
PROMPT, SAMPLE = 48, 160  # tokens of the sample in the summary


class ModelNexusConfig(NEXUSConfig):
    """The sizes of the model; the vocabulary size comes from the data unless it is set."""

    vocab_size: int | None = Field(  # type: ignore[assignment]
        default=None, ge=1, description="vocabulary size; null: that of the data"
    )


class ModelNexusPlugin(Plugin[ModelNexusConfig]):
    """Trains a `NEXUSCore`, and passes hidden states instead of full logits to the losses."""

    config_class = ModelNexusConfig
    slot: ClassVar[str | None] = "model"
    _vocab_size: int | None = None

    @hookimpl
    def make_model(self, engine: Engine) -> nn.Module:
        """Build the model, with the data's vocabulary size unless one is configured."""
        settings = self.config.model_dump(exclude_none=True)
        if self.config.vocab_size is None:
            codec = engine.data.codec if engine.data is not None else None
            if codec is None:
                raise ConfigError(
                    "model_nexus.vocab_size is not set and the data has no tokenizer to take it "
                    "from; set it: ",
                    hint_set("model_nexus.vocab_size", 32000),
                )
            settings["vocab_size"] = codec.size
        codec = engine.data.codec if engine.data is not None else None
        if codec is not None and settings["vocab_size"] < codec.size:
            raise ConfigError(
                f"model_nexus.vocab_size is {settings['vocab_size']:,}, but the data has "
                f"{codec.size:,} ids ({codec}); remove it to use the data's, or set it to "
                f"{codec.size} or more{_OF_BYTES if settings['vocab_size'] == BYTES else ''}"
            )
        self._vocab_size = settings["vocab_size"]
        return NEXUSCore(NEXUSConfig(**settings))

    def state_dict(self) -> StateDict:
        """The vocabulary size from the data, for building the model from a checkpoint."""
        return {} if self._vocab_size is None else {"vocab_size": self._vocab_size}

    @hookimpl
    def forward(self, engine: Engine, batch: Batch) -> NEXUSOutput:
        """Run the backbone over `input_ids`, isolated by `segment_ids` if present.

        Otherwise the padding marked by an `attention_mask` is treated as a separate document. If
        the batch has `variables` `(B, T, n)`, they are observed values of the causal module's
        variables, which its graph then explains.

        Raises:
            DataError: an id is outside the vocabulary (checked on CPU; CUDA raises its own error).
        """
        model = cast(NEXUSCore, engine.model)
        segments = batch.get("segment_ids", batch.get("attention_mask"))
        ids = batch["input_ids"]
        try:
            output = model.hidden(ids, segments)
        except IndexError as error:
            size, low, high = model.config.vocab_size, int(ids.min()), int(ids.max())
            if low >= 0 and high < size:
                raise
            raise DataError(
                f"input_ids range from {low} to {high}, but the model has ids 0 to {size - 1} "
                f"(vocab_size {size}){_OF_BYTES if size == BYTES else ''}"
            ) from error
        return _observed(model, output, batch["variables"]) if "variables" in batch else output

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Show a short sample of the trained model's text after a prompt from the data.

        It is omitted if the weights are sharded. If sampling fails, the summary says so; training
        is complete either way.
        """
        data = engine.data
        split = next(iter(data.valid.values()), None) if data is not None else None
        if data is None or data.codec is None or split is None:
            return {}
        if any(map(is_sharded, engine.model.parameters())):
            return {}
        if not all(bool(weight.isfinite().all()) for weight in engine.model.parameters()):
            return {"sample": "none: the weights are not finite"}
        batch = next(iter(split))
        if "input_ids" not in batch:  # preference pairs
            return {}
        prompt = batch["input_ids"][0, :PROMPT].to(engine.device)
        generator = torch.Generator(engine.device).manual_seed(engine.seed)
        model = cast(NEXUSCore, engine.model)
        try:
            written = model.generate(prompt, SAMPLE, temperature=0.8, top_k=40, generator=generator)
        except RuntimeError as error:  # non-finite logits, although the weights are finite
            return {"sample": f"none: sampling failed: {str(error).partition(chr(10))[0]}"}
        text = data.codec.decode(written.tolist())
        start = len(data.codec.decode(prompt.tolist()))
        found = {"prompt": harmless(text[:start]), "sample": harmless(text[start:])}
        if engine.out is not None:
            trust = " --trust" if any(map(used, engine.plugins.values())) else ""
            out = f"{shlex.quote(str(engine.out))}{trust}"
            found["write more"] = f"nexus-run generate {out} --prompt TEXT"
        return found


def _observed(model: NEXUSCore, output: NEXUSOutput, variables: Tensor) -> NEXUSOutput:
    """The output, with the causal graph's reports for observed variables.

    Raises:
        ConfigError: the model has no such module.
    """
    probe = model.parts["causal"] if "causal" in model.active_modules else None
    if not isinstance(probe, CausalModule):
        raise ConfigError(
            "the batch has 'variables', but the model has no causal module; ",
            hint_set("model_nexus.causal", True),
        )
    reports = {**output.module_outputs["causal"], **probe.graph.reports(variables)}
    return replace(output, module_outputs={**output.module_outputs, "causal": reports})
