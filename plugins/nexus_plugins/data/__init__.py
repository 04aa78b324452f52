"""Data that the user's own function or class makes."""

from nexus_plugins.data.plugin import DataConfig, DataPlugin

__all__ = ["DataConfig", "DataPlugin"]
