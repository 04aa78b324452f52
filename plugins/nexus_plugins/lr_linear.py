"""The learning rate falls along a line."""

from __future__ import annotations

from nexus_core.bases.schedule import Decay, DecayConfig

__all__ = ["LrLinearConfig", "LrLinearPlugin"]


class LrLinearConfig(DecayConfig):
    """Settings of the linear schedule."""


class LrLinearPlugin(Decay[LrLinearConfig]):
    """Warms the learning rate up, then lets it fall to `min_lr` along a straight line."""

    def shape(self, done: float) -> float:
        """A straight line."""
        return 1 - done
