"""A small training engine for PyTorch that emits events, and plugins that do everything else.

Names are imported on first use, so that `nexus-run --help` does not wait for torch.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "nexus_core.engine": "Engine Result",
    "nexus_core.errors": "CheckpointError ConfigError DataError NexusError PluginError RunError",
    "nexus_core.intervals": "Every Interval IntervalField TrainState",
    "nexus_core.batches": "Batch",
    "nexus_core.data": "RunData",
    "nexus_core.plugin": "Plugin PluginConfig StateDict hookimpl",
    "nexus_core.snapshot": "Snapshot",
    "nexus_core.views.history": "History",
    "nexus_core.step": "Step",
    "nexus_core.bases.loader": "ResumableLoader",
    "nexus_core.bases.logger": "Logger LoggerConfig",
    "nexus_core.bases.loss": "Loss LossConfig",
    "nexus_core.bases.schedule": "Schedule ScheduleConfig",
    "nexus_core.bases.parallel": "Parallel ParallelConfig",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nexus_core' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
