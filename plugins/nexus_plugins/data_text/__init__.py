"""Text as training data: many formats, tokenizers, packing, and an order that needs no replay.

Names are imported on first use, so that `nexus-data --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexus_plugins.data_text.config import DataTextConfig, SourceConfig
    from nexus_plugins.data_text.plugin import DataTextPlugin

__all__ = ["DataTextConfig", "DataTextPlugin", "SourceConfig"]

_HOME = {"DataTextConfig": "config", "DataTextPlugin": "plugin", "SourceConfig": "config"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nexus_plugins.data_text' has no attribute '{name}'")
    return getattr(import_module(f"nexus_plugins.data_text.{_HOME[name]}"), name)
