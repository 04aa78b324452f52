"""Rebuild the trained model of a checkpoint without its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nexus_core.errors import CheckpointError, ConfigError
from nexus_plugins._shared.checkpoints import folder
from nexus_plugins._shared.checkpoints.shards import lay_out
from nexus_plugins._shared.checkpoints.weights import MODEL, averaged, checkpoint_of, keys_of
from nexus_plugins.checkpoint.export import blocks_of
from nexus_plugins.model_nexus import NEXUSConfig, NEXUSCore
from nexus_plugins_contrib.model_hf import ModelHfConfig, loading
from nexus_plugins_contrib.model_hf.plugin import FOLDER
from nexus_plugins_contrib.peft import PeftPlugin

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

__all__ = ["Trained", "rebuild"]


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, and its description.

    Args:
        model: the model, with its adapters in place.
        kind: the plugin that built it.
        tuner: the adapters; None: full fine-tuning.
        origin: folder or id of the base weights, if any.
        checkpoint: its checkpoint.
        run: its run folder.
        step: step of the checkpoint.
    """

    model: nn.Module
    kind: str
    tuner: BaseTuner | None
    origin: str | None
    checkpoint: Path
    run: Path
    step: int


def rebuild(source: Path, *, ema: bool) -> Trained:
    """Rebuild the model of a checkpoint, with its weights.

    Args:
        source: the folder of a checkpoint, or of a run, which means its newest one.
        ema: use the averaged weights.

    Raises:
        CheckpointError: there is no complete checkpoint, or its weights do not fit.
        ConfigError: the run's model is of another kind, or its base weights no longer exist.
    """
    found = checkpoint_of(source)
    content = folder.read(found)
    lay_out(content, lambda name, shape: None)
    keys = keys_of(content)
    tensors = content.tensors[MODEL]
    if ema:
        tensors = tensors | averaged(content, keys)
    weights = {name: tensors[key] for name, key in keys.items()}
    blocks, states = blocks_of(content.config), _states(content)
    kind = next((name for name in ("model_hf", "model_nexus") if name in blocks), None)
    if kind is None:
        raise ConfigError(
            "export --to hf: the run's model is neither from Hugging Face (model_hf) nor NEXUS "
            "(model_nexus), so transformers has no architecture for it; export without --to"
        )
    run, peft = found.parent.parent, blocks.get("peft")
    if kind == "model_nexus":
        model, origin = _nexus(blocks[kind], states.get(kind, {})), None
    else:
        model, origin = _hugging_face(ModelHfConfig(**blocks[kind]), run, adapted=peft is not None)
    tuner = None if peft is None else _adapted(model, PeftPlugin(**peft), states.get("peft", {}))
    _fill(model, weights, whole=tuner is None)
    return Trained(model.eval(), kind, tuner, origin, found, run, content.step)


def _states(content: folder.Content) -> dict[str, dict[str, Any]]:
    document: Any = content.documents["state.json"]
    plugins = document.get("plugins") if isinstance(document, dict) else None
    found = plugins if isinstance(plugins, dict) else {}
    return {n: p["state"] for n, p in found.items() if isinstance(p, dict) and "state" in p}


def _nexus(block: dict[str, Any], state: dict[str, Any]) -> nn.Module:
    sizes = {key: value for key, value in {**block, **state}.items() if value is not None}
    return NEXUSCore(NEXUSConfig(**sizes))


def _hugging_face(
    settings: ModelHfConfig, run: Path, *, adapted: bool
) -> tuple[PreTrainedModel, str | None]:
    """A model of the run's architecture, with the base weights if it has adapters."""
    kept = run / FOLDER
    if not adapted:
        if not kept.is_dir():
            raise CheckpointError(f"the run has no {kept}, where model_hf keeps its configuration")
        config = loading.read_config(loading.origin_of(str(kept), None), {})
        return loading.build(config, settings.dtype, settings.attention), None
    if settings.weights == "random":
        raise ConfigError(
            "export --to hf: the base weights were random and are not stored in any file"
        )
    origin = loading.pinned(loading.origin_of(settings.path, settings.revision))
    config = loading.read_config(origin, settings.config)
    chosen = (settings.dtype, settings.attention, settings.quantize, torch.device("cpu"))
    return loading.load(origin, config, *chosen), origin.place


def _adapted(model: nn.Module, peft: PeftPlugin, state: dict[str, Any]) -> BaseTuner:
    tuner = peft.adapt(model)
    peft.load_state_dict(state)
    return tuner


def _fill(model: nn.Module, weights: dict[str, Tensor], *, whole: bool) -> None:
    """Load a checkpoint's weights into a model; frozen ones may already be in place."""
    own = model.state_dict()
    frozen = set() if whole else {n for n, p in model.named_parameters() if not p.requires_grad}
    if odd := sorted((weights.keys() - own.keys()) | (own.keys() - weights.keys() - frozen)):
        where = "the model" if odd[0] in own else "the checkpoint"
        raise CheckpointError(f"the checkpoint does not fit its model: only {where} has '{odd[0]}'")
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the checkpoint does not fit its model: {said}") from error
