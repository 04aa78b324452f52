"""Logs to Weights & Biases: `plugin` is the logger, `handed` and `notes` what it is given."""

from nexus_plugins_contrib.wandb.plugin import WandbConfig, WandbPlugin

__all__ = ["WandbConfig", "WandbPlugin"]
