"""Shard a model over ranks: each keeps a shard of every weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from inspect import ismethod
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from nexus_core import ConfigError
from nexus_core.processes import Ranks, gather, is_sharded
from nexus_plugins._shared.buffers import share_buffers
from nexus_plugins._shared.parameters import blocks
from nexus_plugins.fsdp.config import FsdpConfig, Precision

__all__ = [
    "divide",
    "keep_weights_on_host",
    "kept_whole",
    "mark",
    "marks",
    "part_again",
    "reached",
    "split_groups",
    "sum_gradients",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def divide(
    model: nn.Module, config: FsdpConfig, device: torch.device, ranks: Ranks, width: int
) -> None:
    """Replace the model's parameters with shards of those of rank 0, in place.

    Args:
        model: the model: complete on rank 0, on the meta device on ranks that only receive shards.
        config: which modules are wrapped, and how.
        device: device to train on.
        ranks: the ranks that the model is sharded over.
        width: as in `kept_whole`.

    Raises:
        ConfigError: the modules that the config selects cannot be wrapped, or the model has tensors
            that cannot be broadcast.
    """
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    _shard(model, config, init_device_mesh(device.type, (ranks.size,)), width)
    if any(value.is_meta for value in whole.values()):
        places = _tied(model)
        model.to_empty(device=device)
        for (first, its_name), *others in places:
            for module, name in others:
                module._parameters[name] = first._parameters[its_name]
    _check_filled(model, ranks)
    for name, parameter in model.named_parameters():
        _check_still_tied(name, whole)
        _take_part(parameter, whole[name], device)
    share_buffers(model)


def marks(model: nn.Module) -> dict[str, dict[str, object]]:
    """The attributes of each parameter, such as `_no_weight_decay`; FSDP drops them."""
    return {name: vars(parameter).copy() for name, parameter in model.named_parameters()}


def mark(model: nn.Module, noted: Mapping[str, Mapping[str, object]]) -> None:
    """Set the attributes that `marks` found on each parameter."""
    for name, parameter in model.named_parameters():
        vars(parameter).update(noted.get(name, {}))


def part_again(model: nn.Module) -> None:
    """Reshard the weights that a forward-only pass has left gathered."""
    for part in _parts(model):
        part.reshard()


def kept_whole(model: nn.Module, width: int = 1) -> list[nn.Parameter]:
    """The parameters that every rank keeps whole: scalars, and those with uneven rows.

    Args:
        model: the model.
        width: the number that row sizes must be a multiple of. CPU kernels compute the tail of a
            tensor with scalar instructions, which round differently; if shards consist of rows of
            whole vector registers, an update has no tail, and is the same however it is sharded.
    """
    return [p for p in model.parameters() if p.ndim == 0 or math.prod(p.shape[1:]) % width]


def reached(parameters: Sequence[nn.Parameter], ranks: Ranks) -> list[nn.Parameter]:
    """The parameters that have a gradient on any rank; no device sync."""
    found = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    return [p for p, there in zip(parameters, ranks.sum(found).tolist(), strict=True) if there]


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Sum the gradients of scalars over all ranks, in one all-reduce."""
    if parameters:
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = ranks.sum(torch.stack([gradient.double() for gradient in own]))
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient.to(parameter.dtype)


def keep_weights_on_host(model: nn.Module) -> None:
    """Move the shards to host memory, from where FSDP fetches them; the rest stays."""
    stay = [*model.buffers(), *kept_whole(model)]
    there = [tensor.detach().clone() for tensor in stay]
    model.cpu()
    for tensor, value in zip([*model.buffers(), *kept_whole(model)], there, strict=True):
        tensor.data = value


def split_groups(optimizer: Optimizer, whole: Sequence[nn.Parameter]) -> None:
    """Put whole parameters in separate groups: fused kernels do not accept a mix.

    Args:
        optimizer: an optimizer that has not stepped yet.
        whole: the parameters that are not sharded.
    """
    kept = set(whole)
    for group in list(optimizer.param_groups):
        apart = [p for p in group["params"] if p in kept]
        if 0 < len(apart) < len(group["params"]):
            group["params"] = [p for p in group["params"] if p not in kept]
            optimizer.param_groups.append({**group, "params": apart})


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The modules of each parameter, and its name in them."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return list(found.values())


def _parts(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose weights are gathered together; empty if the model is a single unit."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _shard(model: nn.Module, config: FsdpConfig, mesh: DeviceMesh, width: int) -> None:
    chosen = blocks(model, config.match, "fsdp.match")
    for module in [*reversed(chosen.values()), model]:  # inner modules before outer ones
        try:
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=config.reshard and module is not model,
                mp_policy=_precision(config, torch.float32 if module is model else None),
                offload_policy=CPUOffloadPolicy() if config.offload else OffloadPolicy(),
                ignored_params=set(kept_whole(model, width)),
            )
        except ValueError as error:
            said = str(error).partition("\n")[0]
            raise ConfigError(f"fsdp.match: {said}; choose modules that are called") from error
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo only supports sums
    for name in config.methods:
        if ismethod(getattr(model, name, None)):
            register_fsdp_forward_method(model, name)


def _precision(config: FsdpConfig, output: torch.dtype | None) -> MixedPrecisionPolicy:
    """The precision of a module; the root returns float32, so that losses are not rounded."""
    return MixedPrecisionPolicy(
        param_dtype=_dtype(config.compute_dtype),
        reduce_dtype=_dtype(config.reduce_dtype),
        output_dtype=output if config.compute_dtype else None,
    )


def _dtype(name: Precision | None) -> torch.dtype | None:
    return DTYPES[name] if name else None


def _check_filled(model: nn.Module, ranks: Ranks) -> None:
    empty = [
        f"the tensor '{name}' of {f'the module {path!r}' if path else 'the model itself'}"
        for path, module in model.named_modules()
        for name, held in vars(module).items()
        if not name.startswith("_")  # private names hold parameters, buffers and modules
        for value in tree_leaves(held)
        if isinstance(value, Tensor) and value.is_meta
    ]
    if found := next(filter(None, gather(ranks, empty)), None):
        raise ConfigError(
            f"fsdp.build_once: {found[0]} cannot be received from rank 0, as it is neither a "
            "parameter nor a buffer; register it as a buffer, or set fsdp.build_once=false"
        )


def _check_still_tied(name: str, whole: dict[str, Tensor]) -> None:
    if name not in whole:
        raise ConfigError(
            f"fsdp: '{name}' is tied to a weight gathered with another module; choose "
            "modules with fsdp.match that contain both or neither"
        )


@torch.no_grad()
def _take_part(parameter: nn.Parameter, value: Tensor, device: torch.device) -> None:
    """Fill this rank's shard of a parameter with rank 0's value."""
    value = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
    if is_sharded(parameter):
        part = cast(DTensor, parameter)
        part.copy_(distribute_tensor(value, part.device_mesh, part.placements))
    else:
        dist.broadcast(value, src=0)
        parameter.data = value
