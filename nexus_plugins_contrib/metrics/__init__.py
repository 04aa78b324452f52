"""Evaluation metrics, from torchmetrics or your own; start with `plugin.py`."""

from nexus_plugins_contrib.metrics.plugin import MetricsConfig, MetricsPlugin

__all__ = ["MetricsConfig", "MetricsPlugin"]
