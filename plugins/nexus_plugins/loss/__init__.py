"""A user-defined loss."""

from nexus_plugins.loss.plugin import LossConfig, LossPlugin

__all__ = ["LossConfig", "LossPlugin"]
