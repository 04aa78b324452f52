"""Models too large for one device: `plugin` sets up the run, `shard` shards the weights."""

from __future__ import annotations

from nexus_plugins.fsdp.config import FsdpConfig
from nexus_plugins.fsdp.plugin import FsdpPlugin

__all__ = ["FsdpConfig", "FsdpPlugin"]
