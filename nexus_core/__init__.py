"""A small training engine for PyTorch that emits events, and plugins that do everything else.

Names are imported on first use, so that `nexus-run --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexus_core.engine import Engine, Result
    from nexus_core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        NexusError,
        PluginError,
        RunError,
    )
    from nexus_core.intervals import Every, Interval, IntervalField
    from nexus_core.loader import Batch, ResumableLoader, RunData
    from nexus_core.plugin import (
        Logger,
        LoggerConfig,
        Loss,
        LossConfig,
        Plugin,
        PluginConfig,
        hookimpl,
    )
    from nexus_core.state import Snapshot, StateDict, TrainState

_HOMES = {
    "engine": "Engine Result",
    "errors": "CheckpointError ConfigError DataError NexusError PluginError RunError",
    "intervals": "Every Interval IntervalField",
    "loader": "Batch ResumableLoader RunData",
    "plugin": "Logger LoggerConfig Loss LossConfig Plugin PluginConfig hookimpl",
    "state": "Snapshot StateDict TrainState",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Batch",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Engine",
    "Every",
    "Interval",
    "IntervalField",
    "Logger",
    "LoggerConfig",
    "Loss",
    "LossConfig",
    "NexusError",
    "Plugin",
    "PluginConfig",
    "PluginError",
    "ResumableLoader",
    "Result",
    "RunData",
    "RunError",
    "Snapshot",
    "StateDict",
    "TrainState",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nexus_core' has no attribute '{name}'")
    return getattr(import_module(f"nexus_core.{_HOME[name]}"), name)
