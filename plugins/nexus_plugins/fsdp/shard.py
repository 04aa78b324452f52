"""Divides a model among processes: each keeps a part of every weight."""

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
    """Make the model's parameters parts of those of the main process, in place.

    Args:
        model: whole in the main process; on the meta device in those that are only given parts.
        config: which modules are gathered together, and how.
        device: to train on.
        ranks: this process among those that the model is divided among.
        width: of what is divided, as for `kept_whole`.

    Raises:
        ConfigError: the modules that the config chooses cannot be gathered by themselves, or the
            model holds what cannot be sent.
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
    """What has been noted on each parameter, such as `_no_weight_decay`; FSDP makes them anew."""
    return {name: vars(parameter).copy() for name, parameter in model.named_parameters()}


def mark(model: nn.Module, noted: Mapping[str, Mapping[str, object]]) -> None:
    """Note on each parameter what `marks` found."""
    for name, parameter in model.named_parameters():
        vars(parameter).update(noted.get(name, {}))


def part_again(model: nn.Module) -> None:
    """Free the weights that a pass without a backward pass has left gathered."""
    for part in _parts(model):
        part.reshard()


def kept_whole(model: nn.Module, width: int = 1) -> list[nn.Parameter]:
    """The parameters that every process keeps whole: single numbers, and those of uneven rows.

    Args:
        model: whose parameters.
        width: what the numbers of a row must be a multiple of. Kernels of the host compute the last
            numbers of a tensor by other instructions, which round otherwise; where parts hold rows
            of whole registers, an update has no such end, and is the same however it is divided.
    """
    return [p for p in model.parameters() if p.ndim == 0 or math.prod(p.shape[1:]) % width]


def reached(parameters: Sequence[nn.Parameter], ranks: Ranks) -> list[nn.Parameter]:
    """Those that have a gradient in any process; no device is waited for."""
    found = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    return [p for p, there in zip(parameters, ranks.sum(found).tolist(), strict=True) if there]


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Sum the gradients of scalars over all processes, in one exchange."""
    if parameters:
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = ranks.sum(torch.stack([gradient.double() for gradient in own]))
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient.to(parameter.dtype)


def keep_weights_on_host(model: nn.Module) -> None:
    """Move the parts to host memory, where FSDP fetches them from; the rest stays where it is."""
    stay = [*model.buffers(), *kept_whole(model)]
    there = [tensor.detach().clone() for tensor in stay]
    model.cpu()
    for tensor, value in zip([*model.buffers(), *kept_whole(model)], there, strict=True):
        tensor.data = value


def split_groups(optimizer: Optimizer, whole: Sequence[nn.Parameter]) -> None:
    """Give parameters that are kept whole groups of their own: kernels take no mixture.

    Args:
        optimizer: that has not stepped yet.
        whole: of the model's parameters.
    """
    kept = set(whole)
    for group in list(optimizer.param_groups):
        apart = [p for p in group["params"] if p in kept]
        if 0 < len(apart) < len(group["params"]):
            group["params"] = [p for p in group["params"] if p not in kept]
            optimizer.param_groups.append({**group, "params": apart})


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Of each parameter the modules that hold it, and its name there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return list(found.values())


def _parts(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules of a model whose weights are gathered together; none where it is whole."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _shard(model: nn.Module, config: FsdpConfig, mesh: DeviceMesh, width: int) -> None:
    chosen = blocks(model, config.match, "fsdp.match")
    for module in [*reversed(chosen.values()), model]:  # inner ones before those around them
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
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for name in config.methods:
        if ismethod(getattr(model, name, None)):
            register_fsdp_forward_method(model, name)


def _precision(config: FsdpConfig, output: torch.dtype | None) -> MixedPrecisionPolicy:
    """What a module computes in; the model itself returns 32 bits, or losses would be rounded."""
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
        if not name.startswith("_")  # there are the parameters, buffers and modules
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
    """Fill what this process holds of a parameter with the main process's value."""
    value = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
    if is_sharded(parameter):
        part = cast(DTensor, parameter)
        part.copy_(distribute_tensor(value, part.device_mesh, part.placements))
    else:
        dist.broadcast(value, src=0)
        parameter.data = value
