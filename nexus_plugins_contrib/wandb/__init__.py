"""Logs to Weights & Biases: `plugin` is the logger, `handed` what it was given, on disk."""

from nexus_plugins_contrib.wandb.plugin import WandbConfig, WandbPlugin

__all__ = ["WandbConfig", "WandbPlugin"]
