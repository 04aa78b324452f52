"""Finds a learning rate: raises it from step to step and watches the loss."""

from nexus_plugins.lr_finder.plugin import LrFinderConfig, LrFinderPlugin
from nexus_plugins.lr_finder.sweep import Sweep

__all__ = ["LrFinderConfig", "LrFinderPlugin", "Sweep"]
