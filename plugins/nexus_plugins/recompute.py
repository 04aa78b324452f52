"""Activation checkpointing: recomputes activations instead of keeping them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from nexus_core import ConfigError, Plugin, PluginConfig, hookimpl
from nexus_core.errors import hint_set
from nexus_core.signatures import Several
from nexus_plugins._shared.parameters import blocks
from nexus_plugins._shared.wrapped import give_back_forward, wrap_forward

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["RecomputeConfig", "RecomputePlugin"]


class RecomputeConfig(PluginConfig):
    """Settings of recomputation."""

    match: Several[str] = Field(
        default=(), description="patterns of module names; none: the members of every ModuleList"
    )
    every: int = Field(
        default=1, ge=1, description="recompute every n-th of the modules, starting with the first"
    )


class RecomputePlugin(Plugin[RecomputeConfig]):
    """Keeps only the inputs of the selected modules, and reruns them in the backward pass.

    Gradients are bitwise identical, including dropout, since random generators are restored for the
    second run. Parameter names and `state_dict` do not change.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost";
    `torch.utils.checkpoint`, without re-entering autograd.
    """

    config_class = RecomputeConfig
    api_version: ClassVar[str] = "1.2"
    _wrapped: list[nn.Module]

    @hookimpl(stage="wrap")
    def on_start(self, engine: Engine) -> None:
        """Wrap the modules.

        Raises:
            ConfigError: a pattern matches no module, or the model has none to select.
        """
        self._wrapped = self._chosen(engine.model)[:: self.config.every]
        for module in self._wrapped:
            wrap_forward(module, _recomputing)

    @hookimpl
    def on_close(self) -> None:
        """Restore the modules' own `forward`."""
        for module in getattr(self, "_wrapped", []):
            give_back_forward(module)
        self._wrapped = []

    def _chosen(self, model: nn.Module) -> list[nn.Module]:
        found = blocks(model, self.config.match, "recompute.match")
        outermost = {
            name: module
            for name, module in found.items()
            if not any(name.startswith(f"{other}.") for other in found)
        }
        if not outermost:
            first = next((name for name, _ in model.named_children()), "block")
            raise ConfigError(
                "recompute: the model has no ModuleList; name the modules to recompute, for "
                "instance with ",
                hint_set("recompute.match", [f"*.{first}*"]),
            )
        return list(outermost.values())


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    return run
