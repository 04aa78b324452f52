"""Diagnose a run: `sensors` measure, `rules` judge, `plugin` reports."""

from __future__ import annotations

from nexus_plugins.diagnose.plugin import DiagnoseConfig, DiagnosePlugin

__all__ = ["DiagnoseConfig", "DiagnosePlugin"]
