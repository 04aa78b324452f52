"""Adapters on a frozen model: `adapters` puts them in, `plugin` trains and keeps them."""

from nexus_plugins_contrib.peft.plugin import PeftConfig, PeftPlugin

__all__ = ["PeftConfig", "PeftPlugin"]
