"""The plugin `gradient_noise` for the NEXUS trainer."""

from gradient_noise.plugin import GradientNoiseConfig, GradientNoisePlugin

__all__ = ["GradientNoiseConfig", "GradientNoisePlugin"]
