"""The model's tensors by name, from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from nexus_core.errors import CheckpointError
from nexus_plugins._shared.checkpoints import folder
from nexus_plugins._shared.checkpoints.shards import lay_out
from nexus_plugins._shared.checkpoints.store import checkpoint_at, newest_first, stores_at

__all__ = ["MODEL", "averaged", "checkpoint_of", "keys_of", "named", "weights_of"]

MODEL = "model.safetensors"
STATE = "state.safetensors"
_SHARING = 64
"""How many times larger a model may become when tied weights are separated."""


def weights_of(found: Path, *, ema: bool) -> tuple[dict[str, Tensor], int]:
    """The weights of a checkpoint; every byte read is verified.

    Args:
        found: the checkpoint's folder.
        ema: return the averaged weights of the plugin `ema`.

    Returns:
        The tensors by their names in the model, and the step of the checkpoint.

    Raises:
        CheckpointError: it is incomplete, or has no average.
    """
    content = folder.read(found, wanted=(MODEL, "state.json", *([STATE] if ema else [])))
    lay_out(content, lambda name, shape: None)
    keys = keys_of(content)
    tensors = content.tensors[MODEL] | (averaged(content, keys) if ema else {})
    return {name: tensors[key] for name, key in keys.items()}, content.step


def checkpoint_of(source: Path) -> Path:
    """The checkpoint at a path: the folder itself, or the newest of a run folder.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (found := checkpoint_at(source)) is not None:
        return found
    if folders := newest_first(stores_at(source)):
        return folders[0].resolve()
    raise CheckpointError(
        f"no checkpoint at '{source}'; give the folder of one "
        "(runs/x/checkpoints/best) or of a run (runs/x)"
    )


def keys_of(content: folder.Content) -> dict[str, str]:
    """The key of the tensor for each of the model's names; tied weights share one.

    Raises:
        CheckpointError: the checkpoint's table is invalid.
    """
    table = content.documents["state.json"]
    names = table.get("model") if isinstance(table, dict) else None
    if not isinstance(names, dict):
        raise CheckpointError("state.json has no model")
    keys = {}
    for name, place in names.items():
        key = place.get("$tensor") if isinstance(place, dict) and len(place) == 1 else None
        if not isinstance(key, str) or key not in content.tensors[MODEL]:
            raise CheckpointError(f"the model's '{name}' is not a tensor of {MODEL}")
        keys[name] = key
    tensors = content.tensors[MODEL]
    stored, wanted = (sum(tensors[k].nbytes for k in ks) for ks in (tensors, keys.values()))
    if wanted > _SHARING * stored:
        raise CheckpointError(f"the model's names add up to {wanted} bytes, {MODEL} has {stored}")
    return keys


def named(tensors: dict[str, Tensor], keys: dict[str, str]) -> dict[str, Tensor]:
    """The weights under all of their names in the model, each in its own memory."""
    taken: set[str] = set()
    weights = {}
    for name, key in keys.items():
        weights[name] = tensors[key].clone() if key in taken else tensors[key]
        taken.add(key)
    return weights


def averaged(content: folder.Content, keys: dict[str, str]) -> dict[str, Tensor]:
    """The averages of `ema`, or of its first instance, in the weights' dtypes.

    Raises:
        CheckpointError: there are none, or they are of other weights.
    """
    states = content.tensors[STATE]
    split = {key: key.partition(".state.average.") for key in states}
    owners = sorted(o for o, mark, _ in split.values() if mark and _is_ema(o))
    found = {name: states[key] for key, (owner, _, name) in split.items() if owners[:1] == [owner]}
    if not found or not found.keys() <= keys.keys():
        raise CheckpointError(
            "the checkpoint has no averages; use its last weights, or train with the plugin ema"
        )
    weights = content.tensors[MODEL]
    for name, mean in found.items():
        if mean.shape != weights[keys[name]].shape:
            raise CheckpointError(f"the average of '{name}' has the shape {tuple(mean.shape)}")
    return {keys[name]: mean.to(weights[keys[name]].dtype) for name, mean in found.items()}


def _is_ema(owner: str) -> bool:
    return owner.partition("@")[0] == "plugins.ema"
