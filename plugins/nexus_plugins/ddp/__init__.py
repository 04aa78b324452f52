"""Data-parallel training: `plugin` sets up the run, `cells` sums in a fixed order."""

from __future__ import annotations

from nexus_plugins.ddp.config import DdpConfig
from nexus_plugins.ddp.plugin import DdpPlugin

__all__ = ["DdpConfig", "DdpPlugin"]
