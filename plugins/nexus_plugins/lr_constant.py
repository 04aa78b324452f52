"""A constant learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_core.bases.schedule import Schedule, ScheduleConfig

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["LrConstantConfig", "LrConstantPlugin"]


class LrConstantConfig(ScheduleConfig):
    """Settings of the constant schedule."""


class LrConstantPlugin(Schedule[LrConstantConfig]):
    """Warms up the learning rate and keeps it constant."""

    config_class = LrConstantConfig

    def scale(self, engine: Engine) -> float:
        """Always the base learning rate."""
        return 1.0
