"""Sharded tensors: all ranks write and read them together.

Uses PyTorch's distributed checkpointing, with safetensors files whose headers say which part of
which tensor they contain, so a run can be resumed with any number of processes.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_core.errors import CheckpointError
from nexus_core.processes import Ranks, is_sharded, local_part
from nexus_plugins._shared.checkpoints.folder import SHARDS, Content, sync
from nexus_plugins._shared.checkpoints.tensorfile import HashingReader, check_size
from nexus_plugins._shared.files import opened

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from nexus_core.engine import Engine

__all__ = ["Layout", "Shards", "lay_out", "layout_of", "part_of"]

Files: TypeAlias = dict[str, tuple[int, str]]
Layout: TypeAlias = Callable[[str, torch.Size], "DTensor | None"]
"""Maps a tensor's file, name and shape to a tensor of this run with the sharding it should get."""


class Shards:
    """Writes the shards of all ranks into a checkpoint, while training continues."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._parts: dict[str, DTensor] = {}

    def take_out(self, content: Content, timeout: timedelta | None) -> dict[str, Tensor]:
        """Remove the sharded tensors from a content; every rank must call it at the same step.

        Args:
            content: the content to remove them from.
            timeout: how long to wait for other ranks; None: PyTorch's default.

        Returns:
            This rank's part of each, by reference, by file and name.
        """
        self._parts = {
            f"{file}/{name}": tensors.pop(name)  # type: ignore[misc]
            for file, tensors in content.tensors.items()
            for name in [name for name, tensor in tensors.items() if is_sharded(tensor)]
        }
        if self._parts and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # for use from a thread
        return {name: local_part(tensor) for name, tensor in self._parts.items()}

    def replace(self, copies: Mapping[str, Tensor]) -> None:
        """Replace the parts by copies of them in host memory."""
        from torch.distributed.tensor import DTensor

        for name, tensor in self._parts.items():
            self._parts[name] = DTensor.from_local(
                _of_its_own(copies[name]),
                self._on_host(tensor.device_mesh),
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )

    def write(self, ranks: Ranks, save: Callable[[Callable[[Path], Files]], object]) -> None:
        """Write a checkpoint together with all ranks; every rank must call it.

        Args:
            ranks: this process among its peers.
            save: writes the checkpoint, on rank 0 only; it calls its argument with the temporary
                folder of the checkpoint, and gets the files to list in the manifest.

        Raises:
            OSError: a disk is full, broken or read-only.
        """
        if not self._parts:
            save(lambda folder: {})
            return
        if ranks.is_main:
            self._lead(ranks, save)
            return
        folder = self._told("")
        try:
            if folder:
                self._write(Path(folder), ranks)
        finally:
            fault = self._told("")
        if fault:
            raise OSError(fault)

    def _lead(self, ranks: Ranks, save: Callable[[Callable[[Path], Files]], object]) -> None:
        """On rank 0: save, and tell the other ranks the folder, then the outcome."""
        named, fault = False, "rank 0 failed"

        def write_parts(folder: Path) -> Files:
            nonlocal named
            named = True
            self._told(str(folder))
            return self._write(folder, ranks)

        try:
            save(write_parts)
            fault = ""
        except OSError as error:
            fault = str(error)
            raise
        finally:
            if not named:
                self._told("")
            self._told(fault)

    def _told(self, words: str) -> str:
        """A message from rank 0; it sends two for each checkpoint."""
        shared = [words]
        dist.broadcast_object_list(shared, src=0, group=self._group)
        return shared[0]

    def _write(self, folder: Path, ranks: Ranks) -> Files:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        place = folder / SHARDS
        writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
        # A part that is empty here may be tied to one that is not empty on another rank.
        parts: dict[str, object] = {n: p for n, p in self._parts.items() if local_part(p).numel()}
        fault = ""
        try:
            save(parts, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            fault = "; ".join(f"rank {rank}: {what[0]}" for rank, what in error.failures.items())
            if not all(isinstance(what[0], OSError) for what in error.failures.values()):
                raise CheckpointError(f"the shards cannot be written: {fault}") from error
        found: list[tuple[Files, str]] = [({}, "")] * ranks.size
        own = _described(place, ranks) if not fault else ({}, fault)
        dist.all_gather_object(found, own, group=self._group)
        if faults := [fault for _, fault in found if fault]:
            raise OSError(faults[0])
        return {name: facts for files, _ in found for name, facts in files.items()}

    def _on_host(self, mesh: DeviceMesh) -> DeviceMesh:
        from torch.distributed.device_mesh import DeviceMesh

        if mesh not in self._meshes:
            on_host = mesh.device_type == "cpu"
            self._meshes[mesh] = mesh if on_host else DeviceMesh("cpu", mesh.mesh)
        return self._meshes[mesh]


def layout_of(engine: Engine) -> Layout:
    """How this run shards tensors: weights, optimizer states, and averages of weights."""
    weights = engine.model.state_dict()
    trained = [p for group in engine.optimizer.param_groups for p in group["params"]]

    def like(name: str, shape: torch.Size) -> DTensor | None:
        file, _, key = name.partition("/")
        found = _parameter(key, trained) if file.startswith("optimizer") else _weight(key, weights)
        fits = found is not None and is_sharded(found) and found.shape == shape
        return found if fits else None  # type: ignore[return-value]

    return like


def lay_out(content: Content, like: Layout) -> None:
    """Convert every tensor of a content to this run's layout: whole, or this rank's shard.

    Raises:
        CheckpointError: the shards do not match their file headers.
    """
    for file, tensors in content.tensors.items():
        for name, tensor in tensors.items():
            model = like(f"{file}/{name}", tensor.shape)
            if model is not None:
                tensors[name] = part_of(tensor, model)
    if content.shards is not None:
        for place, tensor in _read_shards(content.shards, like).items():
            file, _, name = place.partition("/")
            content.tensors.setdefault(file, {})[name] = tensor


def _read_shards(folder: Path, like: Layout) -> dict[str, Tensor]:
    """Read the sharded tensors of a checkpoint, by file and name; every rank must call it.

    Args:
        folder: the checkpoint.
        like: how this run shards each of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    for path in sorted((folder / SHARDS).iterdir()):
        with opened(path) as file, ThreadPoolExecutor(1) as pool:
            check_size(HashingReader(file, pool), path.stat().st_size)
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a single process is fine
            table = reader.read_metadata().state_dict_metadata
            tensors: dict[str, Tensor] = {}
            for name, facts in table.items():
                assert isinstance(facts, TensorStorageMetadata)  # the files contain nothing else
                if sum(math.prod(chunk.sizes) for chunk in facts.chunks) != math.prod(facts.size):
                    raise ValueError(f"shards of '{name}' are missing")
                model, kind = like(name, facts.size), facts.properties.dtype
                tensors[name] = (
                    torch.empty(facts.size, dtype=kind)
                    if model is None
                    else torch.empty_like(model, dtype=kind, requires_grad=False)
                )
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder / SHARDS} cannot be read: {error}") from error
    return tensors


def part_of(tensor: Tensor, model: Tensor) -> DTensor:
    """Shard a tensor that every rank has whole like the model; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)  # is_sharded returned True
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def _of_its_own(part: Tensor) -> Tensor:
    """The same memory as a separate storage; PyTorch's writer would copy a view."""
    if not part.numel():
        return part
    flat = part.cpu().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(flat).view(part.dtype).view_as(part)


def _described(place: Path, ranks: Ranks) -> tuple[Files, str]:
    """Size and hash of the files that this rank has written, or its error."""
    files: Files = {}
    try:
        for path in sorted(place.glob(f"shard-{ranks.rank + 1:05d}-*")):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[f"{SHARDS}/{path.name}"] = (path.stat().st_size, digest)
        if ranks.is_main:
            sync(place)
    except OSError as error:
        return {}, f"{error.filename}: {error.strerror}"
    return files, ""


def _parameter(key: str, trained: list[Tensor]) -> Tensor | None:
    """The parameter that a state of the optimizer belongs to: `state.12.exp_avg`."""
    number = key.partition(".")[2].partition(".")[0]
    return trained[int(number)] if number.isdecimal() and int(number) < len(trained) else None


def _weight(key: str, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The weight whose name ends a tensor's name: `plugins.ema.state.average.head.weight`."""
    parts = key.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    return next((weights[ending] for ending in endings if ending in weights), None)
