"""Adds Gaussian noise to the gradients, less and less of it."""

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
        default=0.55, ge=0, description="exponent of the variance's fall with the steps"
    )
    seed: int = Field(default=0, ge=0, description="of the noise, beside the seed of the run")


class GradientNoisePlugin(Plugin[GradientNoiseConfig]):
    """Adds noise of variance `eta / (1 + t) ** gamma` to every gradient of step t = 0, 1, ...

    The noise is a function of the seeds and the step, and comes from a generator of its own. So
    there is no state to save, a resumed run draws what one that was not stopped would draw, all
    processes of a run draw the same, and no other random number of the run changes. It comes
    after clipping, which would take part of it back. `train/gradient_noise` is its standard
    deviation. Sparse gradients are left as they are.

    Source: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep
    Networks", with their gamma; they choose eta from 0.01, 0.3 and 1.
    """

    config_class = GradientNoiseConfig
    api_version = "1.2"
    after = ("clip",)  # where both are at the stage that limits gradients
    conflicts = ("fsdp",)  # each process has parts of the gradients there: the noise would repeat
    _generators: dict[torch.device, torch.Generator]

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Make a generator for each device with parameters."""
        devices = {parameter.device for parameter in engine.parameters()}
        self._generators = {device: torch.Generator(device) for device in devices}

    @hookimpl(stage="limit")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Add the noise of this step; nothing here waits for the device."""
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
    """One seed of several, such that neighbouring steps and seeds have nothing in common."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])
