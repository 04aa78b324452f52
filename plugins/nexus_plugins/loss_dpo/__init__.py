"""Preference training: `pairs` joins answers for one pass, `plugin` is the loss term."""

from nexus_plugins.loss_dpo.plugin import LossDpoConfig, LossDpoPlugin

__all__ = ["LossDpoConfig", "LossDpoPlugin"]
