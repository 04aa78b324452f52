"""Logs to Weights & Biases: `plugin` is the logger, `handed` records what was sent."""

from nexus_plugins_contrib.wandb.plugin import WandbConfig, WandbPlugin

__all__ = ["WandbConfig", "WandbPlugin"]
