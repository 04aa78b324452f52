"""What the digests of a tape cover, from batches to plugin states."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nexus_core import Batch
from nexus_core.batches import leaves
from nexus_core.optimizers import members
from nexus_core.processes import whole

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = [
    "Groups",
    "by_module",
    "environment",
    "generators",
    "gradients",
    "leaves_of",
    "number",
    "of_batch",
    "of_tree",
    "optimizer_states",
    "settings",
    "weights",
]

Groups = dict[str, list[Tensor]]
"""Tensors by the module that they belong to."""

SEEN = 1 << 20  # bytes digested per tensor of a batch; sampled evenly from larger ones


def of_batch(batch: Batch) -> tuple[str, list[Tensor]]:
    """A digest of a batch's host data: the types, shapes and contents of its leaves.

    Returns:
        The digest, and the tensors on other devices, of which it covers only the shapes.
    """
    digest, elsewhere = hashlib.blake2b(digest_size=8), list[Tensor]()
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            if leaf.layout is not torch.strided or leaf.is_nested:
                continue
            if leaf.is_cpu:
                digest.update(_bytes(_thinned(leaf)))
            else:
                elsewhere.append(leaf)
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            seen = leaf.reshape(len(leaf), -1) if leaf.ndim else leaf
            digest.update(
                seen[:, :: _stride(leaf.nbytes)].tobytes() if leaf.ndim else leaf.tobytes()
            )
        else:
            plain = leaf is None or isinstance(leaf, str | bytes | int | float)
            digest.update(repr(leaf if plain else type(leaf).__qualname__).encode())
    return digest.hexdigest(), elsewhere


def generators() -> dict[str, str]:
    """A digest of each random generator of this process, by name."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"].get("key", numpy_state["state"])
    rest = {k: v for k, v in numpy_state.items() if k != "state"}, numpy_state["state"].get("pos")
    found = {
        "python": repr(random.getstate()).encode(),
        "numpy": np.asarray(key).tobytes() + repr(rest).encode(),
        "torch": _bytes(torch.get_rng_state()),
    }
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        module = torch.get_device_module(device.type)
        for index in range(torch.accelerator.device_count()):
            found[f"{device.type}:{index}"] = _bytes(module.get_rng_state(index))
    return {name: hashlib.blake2b(b, digest_size=8).hexdigest() for name, b in found.items()}


def gradients(engine: Engine, depth: int) -> Groups:
    """The gradients of the parameters, by module."""
    groups: Groups = defaultdict(list)
    for name, parameter in engine.model.named_parameters():
        if parameter.grad is not None:
            groups[_module(name, depth)].append(parameter.grad)
    return groups


def weights(engine: Engine, depth: int) -> Groups:
    """The model's saved parameters and buffers, by module."""
    return by_module(engine.model.state_dict(), depth)


def by_module(values: Mapping[str, Any], depth: int) -> Groups:
    """The tensors among values keyed by the model's names, grouped by module."""
    groups: Groups = defaultdict(list)
    for name, value in values.items():
        if isinstance(value, Tensor):
            groups[_module(name, depth)].append(value)
    return groups


def optimizer_states(engine: Engine, depth: int) -> Groups:
    """The optimizers' state of each parameter, by module.

    It is in the model's order: sharded weights may be in other optimizer groups.
    """
    places = {id(p): (at, name) for at, (name, p) in enumerate(engine.model.named_parameters())}
    states = [
        (places.get(id(parameter), (len(places), "")), state)
        for optimizer in members(engine.optimizer).values()
        for parameter, state in optimizer.state.items()
    ]
    groups: Groups = defaultdict(list)
    for (_, name), state in sorted(states, key=itemgetter(0)):
        values = [value for value in state.values() if isinstance(value, Tensor)]
        groups[_module(name, depth)] += values
    return groups


def settings(engine: Engine) -> str:
    """A digest of the optimizers' group settings, such as learning rates, except tensors.

    Groups with the same settings count as one: sharded weights have separate groups.
    """
    groups = Counter[str]()
    for group in engine.optimizer.param_groups:
        kept = {k: v for k, v in group.items() if k != "params" and not _has_tensor(v)}
        groups[repr(kept)] += len(group["params"])
    text = repr(sorted(groups.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def of_tree(value: object) -> str:
    """A hash of a tree of values, including tensor bits; it syncs with the device.

    If a tensor is sharded, every rank must call this.
    """
    digest = hashlib.sha256()
    for path, leaf in _leaves(value):
        digest.update(path.encode())
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(_bytes(whole(leaf.detach()).cpu()))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def number(value: float) -> float | str:
    """A number in JSON form, bit-exact."""
    return value if math.isfinite(value) else str(value)


def environment(engine: Engine) -> dict[str, Any]:
    """What can change a run bitwise without being one of its settings."""
    devices = [str(engine.device)]
    if engine.device.type == "cuda":
        devices.append(torch.cuda.get_device_name(engine.device))
    matmul = torch.backends.cuda.matmul
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "device": ", ".join(devices),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": engine.ranks.size,
        "default dtype": str(torch.get_default_dtype()),
        "matmul precision": f"{torch.get_float32_matmul_precision()}, {matmul.allow_tf32=}",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": f"{torch.backends.cudnn.benchmark=}, {torch.backends.cudnn.deterministic=}",
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "variables": {
            name: os.environ[name]
            for name in ("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
            if name in os.environ
        },
    }


def leaves_of(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of a batch or an output, with the path of each."""
    if isinstance(value, Mapping):
        items: Iterator[tuple[object, object]] = iter(value.items())
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor | type | nn.Module):
        items = iter(vars(value).items())
    else:
        if value is not None:
            yield path, value
        return
    for key, item in items:
        yield from leaves_of(item, f"{path}.{key}" if path else str(key))


def _module(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:-1][:depth]) or "model"


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _thinned(tensor: Tensor) -> Tensor:
    """A large tensor, reduced to some numbers of each row."""
    stride = _stride(tensor.numel() * tensor.element_size())
    return tensor if stride == 1 or tensor.ndim < 2 else tensor.flatten(1)[:, ::stride]


def _stride(size: int) -> int:
    return 1 if size <= SEEN else math.ceil(size / SEEN) | 1


def _has_tensor(value: object) -> bool:
    return any(isinstance(leaf, Tensor) for _, leaf in _leaves(value))


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    else:
        yield path, value
