"""Splits batches into the largest micro-batches that fit: `plugin` splits, `fit` measures."""

from nexus_plugins.auto_accumulate.plugin import AutoAccumulateConfig, AutoAccumulatePlugin

__all__ = ["AutoAccumulateConfig", "AutoAccumulatePlugin"]
