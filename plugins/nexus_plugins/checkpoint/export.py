"""Export only the model of a checkpoint, for programs that do not know runs."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors.torch import save_file
from torch import Tensor

from nexus_core.cli import yaml12
from nexus_core.errors import CheckpointError, ConfigError, suggestion
from nexus_core.places import split
from nexus_core.plugin import name_of
from nexus_plugins._shared.checkpoints import folder
from nexus_plugins._shared.checkpoints.shards import lay_out
from nexus_plugins._shared.checkpoints.weights import MODEL, averaged, checkpoint_of, keys_of, named
from nexus_plugins._shared.files import read_small

__all__ = ["Options", "blocks_of", "export", "exporter"]
_TOKENIZER_LIMIT = 256 << 20

CARD = """---
library_name: nexus-trainer
---

The weights of a model of `{plugin}`, trained for {steps} steps, as `nexus-run export` wrote them.

- `model.safetensors`: the weights by name, for any safetensors reader.
- `config.json`: the settings of the plugin that builds the model. It is not a transformers
  configuration: `AutoConfig` and `AutoModel` do not know this model.
"""


@dataclass(frozen=True)
class Options:
    """How to export a model.

    Args:
        ema: export the averaged weights of the plugin `ema`, if there are any.
        adapters: merged into the base weights, or exported separately.
        shard: the maximum size of a weight file, such as "5GB".
    """

    ema: bool = False
    adapters: Literal["merged", "alone"] = "merged"
    shard: str = "5GB"


Exporter: TypeAlias = Callable[[Path, Path, Options], list[Path]]
"""Exports a checkpoint or run to a new folder, and returns the files in it."""


def exporter(name: str) -> Exporter:
    """Load an export format by name, from the entry-point group `nexus.exporters`.

    Raises:
        ConfigError: the format does not exist, or a package that it needs is missing.
    """
    found = {entry.name: entry for entry in entry_points(group="nexus.exporters")}
    if name not in found:
        raise ConfigError(
            f"--to: got '{name}'.{suggestion(name, found)} Formats: {', '.join(sorted(found))}"
        )
    try:
        made: Exporter = found[name].load()
    except ImportError as error:
        raise ConfigError(
            f"--to {name} needs a package that cannot be imported ({error}); install it: "
            f"pip install 'nexus-trainer[{name}]'"
        ) from error
    return made


def export(source: Path, out: Path, *, ema: bool = False) -> list[Path]:
    """Write a model's weights, its settings and its tokenizer into a folder.

    Every byte of the checkpoint is verified. Tied weights are written under each of their names.

    Args:
        source: a checkpoint folder, a name (`best`, `final`), or a run folder, which means its
            newest checkpoint.
        out: a new folder.
        ema: export the averaged weights of the plugin `ema`, if there are any.

    Returns:
        What was written: `model.safetensors`, `config.json` (the settings of the model's plugin
        and its tensor shapes), `README.md`, which describes it, and `tokenizer.json` if the run has
        one.

    Raises:
        CheckpointError: there is no valid checkpoint, it has no average, or it has been tampered
            with.
        ConfigError: the folder exists.
    """
    if out.exists():
        raise ConfigError(f"'{out}' already exists; export needs a new folder: --out FOLDER")
    found = checkpoint_of(source)
    content = folder.read(found)
    lay_out(content, lambda name, shape: None)  # nothing is sharded here
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
    """The run's tokenizer; links are not followed, as they may point to private files."""
    path = found.parent.parent / "tokenizer.json"
    is_of_run = found.parent.name.partition("@")[0] == "checkpoints"
    try:
        return read_small(path, _TOKENIZER_LIMIT) if is_of_run else None
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"{path} is not a file that can be copied: {error}; remove it, or put the "
            "tokenizer itself there"
        ) from error


def _facts(content: folder.Content, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a reader needs to build the model, and its size.

    The settings of the model's plugin, and its state, which is what it determined at run time.
    """
    blocks = blocks_of(content.config)
    name = next((n for n in blocks if n == "model" or n.startswith("model_")), None)
    place: Any = content.documents["state.json"]
    for key in ("plugins", name, "state"):
        place = place.get(key) if isinstance(place, dict) else None
    found = place if isinstance(place, dict) else {}
    return {
        "model_plugin": name,  # no `model_type`, which transformers would act on
        **(blocks[name] if name else {}),
        **{key: value for key, value in found.items() if _is_plain(value)},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "trained_steps": content.step,
    }


def blocks_of(raw: bytes | None) -> dict[str, dict[str, Any]]:
    """The plugins' settings by name, from an untrusted config.

    Args:
        raw: the checkpoint's `config.yaml`; None if it has none.

    Raises:
        CheckpointError: it cannot be read.
    """
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
