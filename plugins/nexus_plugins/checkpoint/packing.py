"""Convert a run's snapshot to the files of a checkpoint, and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from nexus_core.errors import CheckpointError
from nexus_core.snapshot import Snapshot
from nexus_plugins._shared.checkpoints import folder
from nexus_plugins._shared.checkpoints.folder import Json
from nexus_plugins.checkpoint.codec import TensorBag, decode, encode
from nexus_plugins.checkpoint.kinds import Kinds
from nexus_plugins.checkpoint.storable import plain
from nexus_plugins.checkpoint.validate import checked

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["fresh", "pack", "parts", "unpack"]


def parts(engine: Engine) -> dict[str, Any]:
    """The bulk of a snapshot, without notifying the plugins of a save."""
    states = {name: plugin.state_dict() for name, plugin in engine.plugins.items()}
    model, optimizer = engine.model.state_dict(), engine.optimizer.state_dict()
    return {"model": dict(model), "optimizer": plain(optimizer), "plugins": states}


def pack(snapshot: Snapshot) -> folder.Content:
    """Convert a snapshot to files: tensors still in place, everything else as JSON."""
    state: dict[str, Json] = {"format": folder.FORMAT}
    content = folder.Content(cast(int, snapshot["train"]["step"]), {}, {"state.json": state})
    rest = TensorBag()
    for part, value in snapshot.items():
        bag = TensorBag() if part in ("model", "optimizer") else rest
        prefix = "" if bag is not rest else part
        value = dict(snapshot["model"]) if part == "model" else value
        value = plain(value) if part in ("optimizer", "metrics") else value
        state[part] = encode(value, bag, prefix)
        name = "state" if bag is rest else part
        content.tensors[f"{name}.safetensors"] = bag.tensors
        content.aliases[f"{name}.safetensors"] = bag.aliases
    metadata = getattr(snapshot["model"], "_metadata", None)  # versions of the modules' layouts
    state["modules"] = encode(dict(metadata) if metadata else None, rest, "modules")
    return content


def unpack(
    content: folder.Content, engine: Engine, kinds: Mapping[str, Kinds] = MappingProxyType({})
) -> Snapshot:
    """The snapshot that `pack` made these files from."""
    document = content.documents["state.json"]
    if not isinstance(document, dict) or document.pop("format", None) != folder.FORMAT:
        raise CheckpointError(f"state.json is not of format {folder.FORMAT}")
    tree: dict[str, Any] = {}
    try:
        for part, value in document.items():
            name = part if part in ("model", "optimizer") else "state"
            tree[part] = decode(value, content.tensors[f"{name}.safetensors"])
    except RecursionError as error:
        raise CheckpointError("state.json is nested too deeply") from error
    modules = tree.pop("modules", None)
    snapshot = checked(tree, engine, kinds)
    if snapshot["train"]["step"] != content.step:
        raise CheckpointError("the steps of state.json and manifest.json differ")
    model = OrderedDict(snapshot["model"])
    if isinstance(modules, dict) and all(isinstance(facts, dict) for facts in modules.values()):
        model._metadata = modules  # type: ignore[attr-defined]
    snapshot["model"] = model
    return snapshot


def fresh(engine: Engine) -> Snapshot:
    """The state of a run that has not started, with its own tensors."""
    content = pack(engine.state_dict())
    content.tensors = {
        file: {name: tensor.clone() for name, tensor in tensors.items()}
        for file, tensors in content.tensors.items()
    }
    return unpack(content, engine)
