"""Linear decay of the learning rate."""

from __future__ import annotations

from pydantic import Field

from nexus_core.bases.schedule import WARMUP, Decay, DecayConfig, Warmup
from nexus_core.intervals import Interval

__all__ = ["LrLinearConfig", "LrLinearPlugin"]


class LrLinearConfig(DecayConfig):
    """Settings of the linear schedule."""

    warmup: Warmup = Field(default=Interval(6, "%"), description=WARMUP)


class LrLinearPlugin(Decay[LrLinearConfig]):
    """Warms up the learning rate, then decays it linearly to `min_lr`.

    Source of the warmup: Liu et al. 2019, "RoBERTa", tables 9 and 10: 6% of the steps.
    """

    config_class = LrLinearConfig

    def shape(self, done: float) -> float:
        """A straight line."""
        return 1 - done
