"""Find and read weights: nothing is unpickled, and no link is followed."""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nexus_core.cli.memory import machine_memory
from nexus_core.errors import CheckpointError, ConfigError, suggestion
from nexus_plugins._shared.checkpoints.store import checkpoint_at, newest_first, stores_at
from nexus_plugins._shared.checkpoints.tensorfile import HashingReader, read_tensors
from nexus_plugins._shared.checkpoints.weights import MODEL, checkpoint_of, weights_of
from nexus_plugins._shared.files import opened, read_small

__all__ = ["Weights", "read_weights"]

SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_INDEX = ".safetensors.index.json"
_INDEX_LIMIT = 64 << 20
_PLAIN = re.compile(r"[^/\\\0]+\.safetensors")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Weights:
    """Tensors by name, in host memory.

    Args:
        tensors: tensors as stored.
        origin: what they were read from, in words.
    """

    tensors: dict[str, Tensor]
    origin: str


def read_weights(source: Path, *, ema: bool) -> Weights:
    """Read all weights at a path.

    Args:
        source: a checkpoint or run, a safetensors file, or a folder of such files.
        ema: read the averaged weights of a checkpoint.

    Raises:
        ConfigError: there are no weights, or none that are safe to read.
        CheckpointError: they are damaged.
    """
    if not source.exists():
        raise ConfigError(f"init.source: no '{source}'.{_nearest(source)}")
    if _is_ours(source):
        found = checkpoint_of(source)
        tensors, step = weights_of(found, ema=ema)
        return Weights(tensors, f"{found} (step {step:,}{', averaged' if ema else ''})")
    if ema:
        raise ConfigError(
            f"init.ema: '{source}' is not a run's checkpoint; only those have averaged weights; "
            "remove ema"
        )
    if not source.is_dir():
        _refuse_others([source], source)
        return Weights(_read(source.resolve()), str(source))
    files = _files_of(source)
    _check_memory(files)
    tensors = {}
    for path in files:
        part = _read(path)
        if twice := tensors.keys() & part.keys():
            raise CheckpointError(f"{source}: two files have a tensor '{min(twice)}'")
        tensors |= part
    return Weights(tensors, str(source))


def _is_ours(source: Path) -> bool:
    return checkpoint_at(source) is not None or bool(newest_first(stores_at(source)))


def _nearest(source: Path) -> str:
    if _HUB.fullmatch(str(source)) and not source.parent.exists():
        return (
            f" Runs download nothing: get it with `hf download {source} --local-dir FOLDER` "
            "and give the folder"
        )
    beside = [path.name for path in source.parent.glob("*")] if source.parent.is_dir() else []
    return suggestion(source.name, beside)


def _files_of(folder: Path) -> list[Path]:
    """The weight files of a folder: a single one, or those listed in its index."""
    if (folder / MODEL).exists():
        return [_there(folder / MODEL)]
    names = sorted(path.name for path in folder.iterdir())
    indexes = [name for name in names if name.endswith(_INDEX)]
    if len(indexes) == 1:
        return [_there(folder / name) for name in _listed(_there(folder / indexes[0]))]
    found = [name for name in names if name.endswith(SUFFIX)]
    if len(found) == 1:
        return [_there(folder / found[0])]
    if found:
        raise ConfigError(
            f"init.source: '{folder}' has {len(found)} safetensors files and no index that says "
            f"which belong together: {', '.join(found[:4])}; name one of them"
        )
    _refuse_others([folder / name for name in names], folder)
    raise ConfigError(
        f"init.source: '{folder}' has no weights; expected a run, a checkpoint, or a folder with "
        "safetensors files"
    )


def _listed(index: Path) -> list[str]:
    """The files that an index lists, each once."""
    try:
        table = json.loads(read_small(index, _INDEX_LIMIT))
        names = dict.fromkeys(table["weight_map"].values())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{index}: {error}") from error
    for name in names:
        if not (isinstance(name, str) and _PLAIN.fullmatch(name)):
            raise CheckpointError(f"{index} lists {str(name)[:80]!r}, not a file in this folder")
    return list(names)


def _refuse_others(paths: list[Path], source: Path) -> None:
    """Reject weight files that can only be read by executing code in them."""
    for path in paths:
        if path.suffix in PICKLES:
            raise ConfigError(
                f"init.source: '{path}' is a pickle, which can run arbitrary code when loaded; "
                "if you trust it, convert it once: safetensors.torch.save_file("
                f"torch.load({path.name!r}, weights_only=True), {path.stem + SUFFIX!r})"
            )
    if paths == [source] and source.suffix != SUFFIX:
        raise ConfigError(
            f"init.source: '{source}' is not a safetensors file; expected one, a run, checkpoint "
            "or a folder"
        )


def _there(path: Path) -> Path:
    """The file itself; links are followed only into a Hugging Face cache.

    Raises:
        CheckpointError: it is another link.
    """
    if not path.is_symlink():
        return path
    target = path.resolve()
    cache = path.absolute().parent.parent.parent / "blobs"  # models--x/snapshots/REVISION/file
    if target.parent != cache.resolve() or path.absolute().parent.parent.name != "snapshots":
        raise CheckpointError(f"{path} is a link to {target}, which is not followed; copy the file")
    return target


def _check_memory(files: list[Path]) -> None:
    memory = machine_memory() or sys.maxsize
    if (total := sum(path.stat().st_size for path in files if path.is_file())) > memory:
        raise CheckpointError(
            f"{files[0].parent} has {total:,} bytes, more than this machine's memory of {memory:,}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with opened(path) as file, ThreadPoolExecutor(1, "init-hash") as pool:
            return read_tensors(HashingReader(file, pool), os.fstat(file.fileno()).st_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
