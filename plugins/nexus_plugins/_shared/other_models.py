"""Run the hooks of a run with another model, or with the model's original weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.events import Run
    from nexus_core.step import Step

__all__ = ["at_rest", "forward_of", "has_adapters", "weights_hash", "without_adapters"]

_SAMPLED = 1024  # numbers per tensor that are hashed


class _Instead:
    """The run with another model, for the hooks of one pass."""

    def __init__(self, engine: Run, model: nn.Module) -> None:
        self._run, self.model = engine, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def forward_of(engine: Run, model: nn.Module, batch: Batch, step: Step | None) -> Any:
    """The result of the run's hook `forward` for a batch and another model of the same kind."""
    run = cast("Run", _Instead(engine, model))
    return engine.hook.forward(engine=run, batch=batch, step=step)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters that can be disabled."""
    return any(_switches(module) for module in model.modules())


def _switches(module: nn.Module) -> bool:
    """Whether it is an adapter layer; transformers models have an unrelated method of that name."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "enable_adapters")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Disable the adapters of all layers."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers: list[Any] = [module for module in model.modules() if _switches(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


def weights_hash(model: nn.Module) -> str:
    """A hash of a model's weights; of large tensors it reads evenly spread samples."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(remove_duplicate=False)):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
