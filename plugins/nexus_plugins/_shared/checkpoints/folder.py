"""One checkpoint: a folder that is written atomically, and read only if it is complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import file_digest
from io import FileIO
from pathlib import Path
from typing import TypeAlias, Union

from torch import Tensor

from nexus_core.cli.memory import machine_memory
from nexus_core.errors import CheckpointError
from nexus_core.processes import Ranks
from nexus_plugins._shared.checkpoints.tensorfile import (
    HashingReader,
    HashingWriter,
    read_tensors,
    write_tensors,
)
from nexus_plugins._shared.files import opened

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SHARDS",
    "Content",
    "Json",
    "Manifest",
    "read",
    "read_manifest",
    "sync",
    "write",
]

Json: TypeAlias = Union[bool, int, float, str, "list[Json]", "dict[str, Json]", None]
"""A JSON value."""

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS = "shards"
"""Folder within a checkpoint for the shards of sharded tensors."""
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "state.safetensors")
JSON_FILES = ("state.json", "lock.json")
OPTIONAL = ("config.yaml",)

_DAMAGED = "its SHA-256 differs from the manifest: it is damaged"
_JSON_LIMIT = 256 << 20
_MANIFEST_LIMIT = 1 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(SHARDS + r"/shard-\d{5,9}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass
class Content:
    """The contents of a checkpoint folder.

    Args:
        step: optimizer steps done.
        tensors: file name to its tensors by name.
        aliases: file name to names of tensors that are stored under another name (tied weights).
        documents: file name to its JSON.
        config: the resolved config of the run, as text.
        keep: exempt it from retention.
        shards: when read: the folder itself, if it has sharded tensors.
        source: when read: the folder.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, Json]
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
    config: bytes | None = None
    keep: bool = False
    shards: Path | None = None
    source: Path | None = None


@dataclass(frozen=True)
class Manifest:
    """The table of contents, written last: without it, a folder is not a checkpoint."""

    step: int
    keep: bool
    files: Mapping[str, tuple[int, str]]
    """File name to its size in bytes and its SHA-256."""


def write(
    folder: Path,
    content: Content,
    before_rename: Callable[[], None],
    write_parts: Callable[[Path], Mapping[str, tuple[int, str]]],
) -> None:
    """Write a checkpoint under a temporary name, sync it, and rename it.

    Args:
        folder: the final name.
        content: what to write; its tensors must be in host memory.
        before_rename: makes the name available if the folder already exists.
        write_parts: writes the sharded tensors into the given folder; returns the size and SHA-256
            of each file.

    Raises:
        OSError: the disk is full, broken or read-only. Nothing is left behind under `folder`.
        CheckpointError: the content cannot be stored.
    """
    beside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        files = dict(write_parts(beside))
        for name, tensors in content.tensors.items():
            metadata = {"format": "pt", **content.aliases.get(name, {})}
            with _Written(beside / name, files) as file:
                write_tensors(file, tensors, metadata)
        for name, document in content.documents.items():
            with _Written(beside / name, files) as file:
                file.write(_to_json(name, document))
        if content.config is not None:
            with _Written(beside / "config.yaml", files) as file:
                file.write(content.config)
        listed: dict[str, Json] = {
            name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()
        }
        manifest: Json = {
            "format": FORMAT, "step": content.step, "keep": content.keep, "files": listed,
        }  # fmt: skip
        with _Written(beside / MANIFEST, {}) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        sync(beside)
        before_rename()
        beside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def read(
    folder: Path,
    ranks: Ranks = Ranks(),  # noqa: B008 (it is frozen)
    wanted: Collection[str] | None = None,
) -> Content:
    """Read a checkpoint and verify every byte.

    Args:
        folder: the checkpoint.
        ranks: this process's rank among those that read it; sharded tensors are not read, and their
            files are verified by one rank each.
        wanted: the files to read, other than those of sharded tensors; None: all.

    Raises:
        CheckpointError: it is not a checkpoint, or incomplete; the message says why.
    """
    manifest = read_manifest(folder)
    files = {
        name: facts
        for name, facts in manifest.files.items()
        if wanted is None or name in wanted or _SHARD.fullmatch(name)
    }
    total = sum(size for name, (size, _) in files.items() if not _SHARD.fullmatch(name))
    if total > (memory := machine_memory() or sys.maxsize):
        raise CheckpointError(f"{folder} has {total} bytes, but this machine only {memory}")
    content = Content(manifest.step, {}, {}, keep=manifest.keep, source=folder)
    with ThreadPoolExecutor(1, "checkpoint-hash") as pool:
        for number, (name, (size, digest)) in enumerate(files.items()):
            try:
                if not _SHARD.fullmatch(name):
                    _read_file(folder / name, size, digest, pool, content)
                    continue
                content.shards = folder
                if number % ranks.size == ranks.rank:
                    _check_file(folder / name, digest)
            except CheckpointError as error:
                raise CheckpointError(f"{folder / name}: {error}") from error
            except OSError as error:
                raise CheckpointError(f"{folder / name}: {error.strerror or error}") from error
    return content


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest, and check that each file exists with its size.

    Raises:
        CheckpointError: it is missing or invalid, or a file is missing or has another size.
    """
    path = folder / MANIFEST
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MANIFEST_LIMIT:
                raise CheckpointError(f"{size} bytes are too many for a manifest")
            manifest = _manifest(json.loads(file.readall()))
        for name, (expected, _) in manifest.files.items():
            path = folder / name
            with opened(path) as file:
                _expect_size(file, expected)
        _check_listed(folder / SHARDS, manifest)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a manifest: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return manifest


def sync(folder: Path) -> None:
    """Sync a folder, so that its names survive a power failure; Windows does so itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Written:
    """A new file, synced on exit, whose size and hash are recorded."""

    def __init__(self, path: Path, files: dict[str, tuple[int, str]]) -> None:
        self._path = path
        self._files = files

    def __enter__(self) -> HashingWriter:
        self._file = FileIO(self._path, "x")
        self._writer = HashingWriter(self._file)
        return self._writer

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())
                self._files[self._path.name] = (self._writer.size, self._writer.sha256())


def _read_file(
    path: Path, size: int, digest: str, pool: ThreadPoolExecutor, content: Content
) -> None:
    with opened(path) as file:
        _expect_size(file, size)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        reader = HashingReader(file, pool)
        if path.name in TENSOR_FILES:
            content.tensors[path.name] = read_tensors(reader, size)
            raw = None
        elif size > _JSON_LIMIT:
            raise CheckpointError(f"{size} bytes exceed the limit of {_JSON_LIMIT}")
        else:
            raw = reader.read(size)
        if reader.sha256() != digest:
            raise CheckpointError(_DAMAGED)
    if raw is not None and path.name in JSON_FILES:
        content.documents[path.name] = _from_json(raw)
    elif raw is not None:
        content.config = bytes(raw)


def _check_file(path: Path, digest: str) -> None:
    with opened(path) as file:
        if file_digest(file, "sha256").hexdigest() != digest:
            raise CheckpointError(_DAMAGED)


def _check_listed(shards: Path, manifest: Manifest) -> None:
    """Check that the folder of shards is a folder, and that every file in it is listed."""
    there = {f"{SHARDS}/{path.name}" for path in shards.iterdir()} if shards.is_dir() else set()
    if shards.is_symlink() or there != set(filter(_SHARD.fullmatch, manifest.files)):
        raise CheckpointError(f"the folder '{SHARDS}' does not match the manifest")


def _expect_size(file: FileIO, expected: int) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise CheckpointError(f"it has {size} bytes, but the manifest says {expected}")


def _manifest(parsed: object) -> Manifest:
    if not isinstance(parsed, dict) or parsed.keys() != {"format", "step", "keep", "files"}:
        raise ValueError("format, step, keep and files are required")
    step, keep, files = parsed["step"], parsed["keep"], parsed["files"]
    if parsed["format"] != FORMAT:
        raise ValueError(f"its format is {parsed['format']!r}; this release reads {FORMAT}")
    if type(step) is not int or type(keep) is not bool or not isinstance(files, dict):
        raise ValueError("step, keep or files has the wrong type")
    required = {*TENSOR_FILES, *JSON_FILES}
    single = {name for name in files if not _SHARD.fullmatch(name)}
    if not required <= single <= required.union(OPTIONAL):
        odd = single ^ required
        raise ValueError(f"its files are not those of a checkpoint: {str(sorted(odd))[:200]}")
    for facts in files.values():
        if not isinstance(facts, dict) or facts.keys() != {"size", "sha256"}:
            raise ValueError("a file is not described by size and sha256")
        if type(facts["size"]) is not int or not _HASH.fullmatch(str(facts["sha256"])):
            raise ValueError("a size or a hash is malformed")
    return Manifest(step, keep, {n: (f["size"], f["sha256"]) for n, f in files.items()})


def _to_json(name: str, document: Json) -> bytes:
    text = json.dumps(document, allow_nan=False).encode()
    if len(text) > _JSON_LIMIT:
        raise CheckpointError(
            f"{name} would have {len(text)} bytes; a plugin stores too much outside tensors"
        )
    return text


def _from_json(raw: bytes | bytearray) -> Json:
    try:
        parsed: Json = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"it is not JSON: {error}") from error
    return parsed


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
