"""Models that no single device could hold: `plugin` joins the run, `shard` divides the weights."""

from __future__ import annotations

from nexus_plugins.fsdp.config import FsdpConfig
from nexus_plugins.fsdp.plugin import FsdpPlugin

__all__ = ["FsdpConfig", "FsdpPlugin"]
