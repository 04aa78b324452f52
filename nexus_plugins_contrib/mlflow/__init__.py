"""Logs to MLflow: `plugin` is the logger, `names` converts names."""

from nexus_plugins_contrib.mlflow.plugin import MlflowConfig, MlflowPlugin

__all__ = ["MlflowConfig", "MlflowPlugin"]
