"""Adds Gaussian noise with decaying variance to gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from nexus_core import Plugin, PluginConfig, hookimpl
from pydantic import Field

if TYPE_CHECKING:
    from nexus_core import Engine, Step
    from torch import Tensor

__all__ = ["GradientNoiseConfig", "GradientNoisePlugin"]


class GradientNoiseConfig(PluginConfig):
    """Settings of the noise."""

    eta: float = Field(
        default=0.01, ge=0, description="variance of the noise in the first step; 0: none"
    )
    gamma: float = Field(
        default=0.55, ge=0, description="exponent of the decay of the variance with the step"
    )
    seed: int = Field(
        default=0, ge=0, description="seed of the noise, combined with the run's seed"
    )


class GradientNoisePlugin(Plugin[GradientNoiseConfig]):
    """Adds noise of variance `eta / (1 + t) ** gamma` to every gradient of step t = 0, 1, ...

    The noise is a function of the seeds and the step, drawn from its own generator. So there is no
    state to save, resuming is exact, all processes draw the same noise, and no other random number
    of the run changes. It is added after clipping, which would otherwise shrink it. Its standard
    deviation is logged as `train/gradient_noise`. Sparse gradients are unchanged.

    Source: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep
    Networks", with their gamma; they choose eta from 0.01, 0.3 and 1.
    """

    config_class = GradientNoiseConfig
    api_version = "1.2"
    after = ("clip",)  # within the stage `limit`, where both run
    conflicts = ("fsdp",)  # gradients are sharded there: every process would draw the same noise
    _generators: dict[torch.device, torch.Generator]

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Create a generator for each device with parameters."""
        devices = {parameter.device for parameter in engine.parameters()}
        self._generators = {device: torch.Generator(device) for device in devices}

    @hookimpl(stage="limit")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Add the noise of this step, without synchronizing with the device."""
        deviation = (self.config.eta / step.number**self.config.gamma) ** 0.5
        engine.log("gradient_noise", deviation)
        if deviation == 0:
            return
        for generator in self._generators.values():
            generator.manual_seed(_mixed(engine.seed, self.config.seed, step.number - 1))
        for parameter in engine.parameters(step.turn):
            gradient = parameter.grad
            if gradient is not None and not gradient.is_sparse:
                gradient.add_(_normal_like(gradient, self._generators), alpha=deviation)


def _normal_like(tensor: Tensor, generators: dict[torch.device, torch.Generator]) -> Tensor:
    device = tensor.device
    generator = generators[device]
    return torch.randn(tensor.shape, generator=generator, device=device, dtype=tensor.dtype)


def _mixed(*seeds: int) -> int:
    """Mix several seeds into one, so that neighbouring steps and seeds are uncorrelated."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])
