"""One model in several processes: `plugin` joins the run, `cells` sums in an order of its own."""

from __future__ import annotations

from nexus_plugins.ddp.config import DdpConfig
from nexus_plugins.ddp.plugin import DdpPlugin

__all__ = ["DdpConfig", "DdpPlugin"]
