"""A checkpoint's model alone, for programs that know nothing of runs."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nexus_core.cli import yaml12
from nexus_core.errors import CheckpointError, ConfigError
from nexus_core.places import split
from nexus_core.plugin import name_of
from nexus_plugins._shared.checkpoints import folder
from nexus_plugins._shared.checkpoints.shards import lay_out
from nexus_plugins._shared.checkpoints.weights import MODEL, averaged, checkpoint_of, keys_of, named
from nexus_plugins._shared.files import read_small

__all__ = ["export"]
_TOKENIZER_LIMIT = 256 << 20

CARD = """---
library_name: nexus-trainer
---

The weights of a model of `{plugin}`, trained for {steps} steps, as `nexus-run export` wrote them.

- `model.safetensors`: the weights by name, for any reader of safetensors.
- `config.json`: the settings of the plugin that builds the model. It is no configuration of
  transformers, whose `AutoConfig` and `AutoModel` do not know this model.
"""


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
        and its tensors' sizes), `README.md`, which says what it is, and `tokenizer.json` where the
        run has one.

    Raises:
        CheckpointError: there is no whole checkpoint, or it holds no average, or what somebody
            has written into it.
        ConfigError: the folder exists.
    """
    if out.exists():
        raise ConfigError(f"'{out}' exists; export needs a folder of its own: --out FOLDER")
    found = checkpoint_of(source)
    content = folder.read(found)
    lay_out(content, lambda name, shape: None)  # nothing is divided here
    tensors, keys = content.tensors[MODEL], keys_of(content)
    if ema:
        tensors = tensors | averaged(content, keys)
    weights = named(tensors, keys)
    facts = _facts(content, tensors)
    tokenizer = _tokenizer(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        draft = Path(beside) / out.name
        draft.mkdir()
        save_file(weights, draft / MODEL, metadata={"format": "pt"})
        text = json.dumps(facts, indent=2, default=str)
        (draft / "config.json").write_text(text + "\n", encoding="utf-8")
        card = CARD.format(plugin=facts["model_plugin"] or "the program", steps=content.step)
        (draft / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            (draft / "tokenizer.json").write_bytes(tokenizer)
        written = sorted(path.name for path in draft.iterdir())
        draft.rename(out)
    return [out / name for name in written]


def _tokenizer(found: Path) -> bytes | None:
    """The run's tokenizer; a link may lead to what nobody meant to export, and is not followed."""
    path = found.parent.parent / "tokenizer.json"
    is_of_run = found.parent.name.partition("@")[0] == "checkpoints"
    try:
        return read_small(path, _TOKENIZER_LIMIT) if is_of_run else None
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"{path} is not a file of the run that can be copied: {error}; remove it, or put the "
            "tokenizer itself there"
        ) from error


def _facts(content: folder.Content, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a reader must know to build the model, and how large it is.

    The settings of the model's plugin, and its state: what it found out by itself.
    """
    blocks = _blocks(content.config)
    name = next((n for n in blocks if n == "model" or n.startswith("model_")), None)
    place: Any = content.documents["state.json"]
    for key in ("plugins", name, "state"):
        place = place.get(key) if isinstance(place, dict) else None
    found = place if isinstance(place, dict) else {}
    return {
        "model_plugin": name,  # no `model_type`: that is a promise to transformers
        **(blocks[name] if name else {}),
        **{key: value for key, value in found.items() if _is_plain(value)},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "trained_steps": content.step,
    }


def _blocks(raw: bytes | None) -> dict[str, dict[str, Any]]:
    """The settings of the plugins, from a config that somebody may have written."""
    if raw is None:
        return {}
    try:
        settings = yaml12.parse(raw.decode("utf-8-sig")).value
    except ValueError as error:
        raise CheckpointError(f"config.yaml of the checkpoint cannot be read: {error}") from error
    blocks = settings.get("plugins") if isinstance(settings, dict) else None
    found = blocks.items() if isinstance(blocks, dict) else ()
    blocks = {str(key): block for key, block in found if isinstance(block, dict)}
    return {name_of(split(key)[1]) or key: block for key, block in blocks.items()}  # ./net.py:...


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
