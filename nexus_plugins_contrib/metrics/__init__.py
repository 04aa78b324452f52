"""Metrics of evaluations, by torchmetrics or your own; `plugin.py` is where it begins."""

from nexus_plugins_contrib.metrics.plugin import MetricsConfig, MetricsPlugin

__all__ = ["MetricsConfig", "MetricsPlugin"]
