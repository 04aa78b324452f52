"""A checkpoint's model alone, for programs that know nothing of runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from nexus_core.errors import CheckpointError, ConfigError
from nexus_plugins.checkpoint import folder
from nexus_plugins.checkpoint.shards import lay_out
from nexus_plugins.checkpoint.store import Store, is_checkpoint

__all__ = ["export"]

MODEL = "model.safetensors"


def export(source: Path, out: Path, *, ema: bool = False) -> list[Path]:
    """Write a model's weights, its settings and its tokenizer into a folder.

    Every byte of the checkpoint is checked on the way. Tied weights are written under each of
    their names.

    Args:
        source: the folder of a checkpoint, a name of one (`best`, `final`), or the folder of a
            run, which means its newest checkpoint.
        out: a new folder.
        ema: take the averaged weights that the plugin `ema` keeps, where there are any.

    Returns:
        What was written: `model.safetensors`, `config.json` (the settings of the model's plugin
        and its tensors' sizes) and `tokenizer.json` where the run has one.

    Raises:
        CheckpointError: there is no whole checkpoint, or it holds no average.
        ConfigError: the folder exists.
    """
    if out.exists():
        raise ConfigError(f"'{out}' exists; export needs a folder of its own: --out FOLDER")
    found = _folder_of(source)
    content = folder.read(found)
    lay_out(content, lambda name, shape: None)  # nothing is divided here
    tensors, keys = content.tensors[MODEL], _keys(content)
    if ema:
        tensors = tensors | _averaged(content, keys)
    weights = _named(tensors, keys)
    out.mkdir(parents=True)
    save_file(weights, out / MODEL, metadata={"format": "pt"})
    _write_config(content, tensors, out / "config.json")
    written = [out / MODEL, out / "config.json"]
    tokenizer = found.parent.parent / "tokenizer.json"
    if tokenizer.is_file():
        written.append(Path(shutil.copyfile(tokenizer, out / "tokenizer.json")))
    return written


def _folder_of(source: Path) -> Path:
    if is_checkpoint(source):
        return source.resolve()
    for root in (source / "checkpoints", source):
        if folders := Store(root).folders():
            return folders[-1].resolve()
    raise CheckpointError(
        f"there is no checkpoint at '{source}'; give the folder of one "
        "(runs/x/checkpoints/best) or of a run (runs/x)"
    )


def _keys(content: folder.Content) -> dict[str, str]:
    """Of each of the model's names, the key of its tensor; tied weights share one."""
    table = content.documents["state.json"]
    names = table.get("model") if isinstance(table, dict) else None
    if not isinstance(names, dict):
        raise CheckpointError("state.json holds no model")
    keys = {}
    for name, place in names.items():
        key = place.get("$tensor") if isinstance(place, dict) else None
        if not isinstance(key, str) or key not in content.tensors[MODEL]:
            raise CheckpointError(f"the model's '{name}' is not a tensor of {MODEL}")
        keys[name] = key
    return keys


def _named(tensors: dict[str, Tensor], keys: dict[str, str]) -> dict[str, Tensor]:
    """The weights, each under every name that the model has for it, in memory of its own."""
    taken: set[str] = set()
    weights = {}
    for name, key in keys.items():
        weights[name] = tensors[key].clone() if key in taken else tensors[key]
        taken.add(key)
    return weights


def _averaged(content: folder.Content, keys: dict[str, str]) -> dict[str, Tensor]:
    """The averages that `ema` keeps, by the keys and in the dtypes of the weights."""
    prefix = "plugins.ema.state.average."
    found = {
        key.removeprefix(prefix): tensor
        for key, tensor in content.tensors["state.safetensors"].items()
        if key.startswith(prefix)
    }
    if not found or not found.keys() <= keys.keys():
        raise CheckpointError(
            "the checkpoint holds no averaged weights; train with --plugins ema, or leave out --ema"
        )
    weights = content.tensors[MODEL]
    return {keys[name]: mean.to(weights[keys[name]].dtype) for name, mean in found.items()}


def _write_config(content: folder.Content, tensors: dict[str, Tensor], path: Path) -> None:
    """What a reader must know to build the model, and how large it is.

    The settings of the model's plugin, and its state: what it found out by itself.
    """
    settings: Any = yaml.safe_load(content.config) if content.config else {}
    blocks = settings.get("plugins") or {}
    name = next((name for name in blocks if name.startswith("model_")), None)
    state: Any = content.documents["state.json"]
    found = state.get("plugins", {}).get(name, {}).get("state", {}).items()
    facts = {
        "model_type": name,
        **(blocks[name] if name else {}),
        **{key: value for key, value in found if isinstance(value, str | int | float)},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "trained_steps": content.step,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
