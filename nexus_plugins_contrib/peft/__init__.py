"""Adapters on a frozen model: `adapters` inserts them, `plugin` trains and saves them."""

from nexus_plugins_contrib.peft.plugin import PeftConfig, PeftPlugin

__all__ = ["PeftConfig", "PeftPlugin"]
