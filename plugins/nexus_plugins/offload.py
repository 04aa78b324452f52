"""Keeps activations in CPU memory until the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nexus_core import ConfigError, Plugin, PluginConfig, hookimpl
from nexus_core.errors import hint_add
from nexus_core.signatures import Several
from nexus_plugins._shared.parameters import matching
from nexus_plugins._shared.wrapped import give_back_forward, wrap_forward

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["OffloadConfig", "OffloadPlugin"]

KIB = 1024


class OffloadConfig(PluginConfig):
    """Settings of offloading."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"without_cuda": "copy"}]})
    match: Several[str] = Field(
        default=("*",), description="patterns of names of modules whose activations are offloaded"
    )
    min_kib: float = Field(
        default=1024,
        ge=0,
        le=1e9,
        description="smaller tensors stay on the device, in KiB, as each transfer has overhead",
    )
    without_cuda: Literal["refuse", "copy"] = Field(
        default="refuse",
        description="on other devices: raise an error, or copy within CPU memory (saves nothing; "
        "for tests)",
    )


class OffloadPlugin(Plugin[OffloadConfig]):
    """Offloads tensors that the selected modules save for backward to pinned CPU memory.

    The copies overlap with computation, on a separate stream. Gradients are bitwise identical.
    Weights, and tensors saved outside these modules (by the losses), are never moved.

    Source: Rhu et al. 2016, "vDNN"; the hooks are those of `torch.autograd.graph`, as in
    `save_on_cpu`, which waits for each copy and moves weights too.
    """

    config_class = OffloadConfig
    api_version: ClassVar[str] = "1.2"
    after: ClassVar[tuple[str, ...]] = ("recompute",)  # then only its inputs are offloaded
    _wrapped: list[nn.Module]

    @hookimpl(stage="wrap")
    def on_start(self, engine: Engine) -> None:
        """Wrap the modules.

        Raises:
            ConfigError: the device shares the host's memory, or a pattern matches no module.
        """
        if engine.device.type != "cuda" and self.config.without_cuda == "refuse":
            raise ConfigError(
                f"offload moves activations from CUDA to CPU memory, but this run is on "
                f"{engine.device}; remove offload, and try ",
                hint_add("recompute"),
            )
        mover = _Mover(engine.model, engine.device, int(self.config.min_kib * KIB))
        self._wrapped = self._chosen(engine.model)
        for module in self._wrapped:
            wrap_forward(module, partial(_offloading, mover=mover))

    @hookimpl
    def on_close(self) -> None:
        """Restore the modules' own `forward`."""
        for module in getattr(self, "_wrapped", []):
            give_back_forward(module)
        self._wrapped = []

    def _chosen(self, model: nn.Module) -> list[nn.Module]:
        """The matching modules, except those inside another one."""
        named = {name: module for name, module in model.named_modules() if name}
        key = "offload.match"
        found = {n for p in self.config.match for n in matching(named, p, key, "module")}
        inner = {n for n in found if any(n.startswith(f"{other}.") for other in found)}
        return [named[name] for name in named if name in found - inner]


class _Mover:
    """Copies saved tensors to host memory, and back when autograd unpacks them."""

    def __init__(self, model: nn.Module, device: torch.device, least: int) -> None:
        self._model, self._least = model, least
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def hooks(self) -> AbstractContextManager[None]:
        """Within this context, tensors saved for backward are offloaded."""
        weights = {p.untyped_storage().data_ptr() for p in self._model.parameters()}

        def keep(tensor: Tensor) -> tuple[torch.device, Tensor]:
            moves = (
                tensor.layout == torch.strided
                and tensor.nbytes >= self._least
                and tensor.untyped_storage().data_ptr() not in weights
            )
            return tensor.device, self._to_host(tensor) if moves else tensor

        def bring(kept: tuple[torch.device, Tensor]) -> Tensor:
            device, tensor = kept
            return tensor if tensor.device == device else self._to_device(tensor, device)

        return saved_tensors_hooks(keep, bring)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._stream is None:
            return tensor.clone()
        computing = torch.cuda.current_stream(tensor.device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host

    def _to_device(self, host: Tensor, device: torch.device) -> Tensor:
        if self._stream is None:
            return host.to(device)
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._stream):  # after the copy to the host, in the same stream
            tensor = host.to(device, non_blocking=True)
        computing.wait_stream(self._stream)
        tensor.record_stream(computing)
        return tensor


def _offloading(forward: Callable[..., Any], mover: _Mover) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        with mover.hooks():
            return forward(*arguments, **keywords)

    return run
