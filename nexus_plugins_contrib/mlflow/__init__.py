"""Logs to MLflow: `plugin` is the logger, `names` what MLflow takes as a name."""

from nexus_plugins_contrib.mlflow.plugin import MlflowConfig, MlflowPlugin

__all__ = ["MlflowConfig", "MlflowPlugin"]
