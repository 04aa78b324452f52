"""A small training engine for PyTorch that emits events, and plugins that do everything else.

Names are imported on first use, so that `nexus-run --help` does not wait for torch.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "engine": ("Engine", "Result"),
    "errors": (
        *("CheckpointError", "ConfigError", "DataError"),
        *("NexusError", "PluginError", "RunError"),
    ),
    "intervals": ("Every", "Interval", "IntervalField"),
    "loader": ("Batch", "ResumableLoader", "RunData"),
    "plugin": (
        "Logger",
        "LoggerConfig",
        "Loss",
        "LossConfig",
        "Plugin",
        "PluginConfig",
        "hookimpl",
    ),
    "state": ("Snapshot", "StateDict", "TrainState"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nexus_core' has no attribute '{name}'")
    return getattr(import_module(f"nexus_core.{_HOME[name]}"), name)
