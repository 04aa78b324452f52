"""A loss that the user names."""

from nexus_plugins.loss.plugin import LossConfig, LossPlugin

__all__ = ["LossConfig", "LossPlugin"]
