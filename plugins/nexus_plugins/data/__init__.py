"""Data from your own function or class."""

from nexus_plugins.data.plugin import DataConfig, DataPlugin

__all__ = ["DataConfig", "DataPlugin"]
