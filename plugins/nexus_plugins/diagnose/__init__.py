"""Says in words what is wrong with a run: `sensors` read, `rules` judge, `plugin` speaks."""

from __future__ import annotations

from nexus_plugins.diagnose.plugin import DiagnoseConfig, DiagnosePlugin

__all__ = ["DiagnoseConfig", "DiagnosePlugin"]
