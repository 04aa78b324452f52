"""Cosine decay of the learning rate."""

from __future__ import annotations

import math

from nexus_core.bases.schedule import Decay, DecayConfig

__all__ = ["LrCosineConfig", "LrCosinePlugin"]


class LrCosineConfig(DecayConfig):
    """Settings of the cosine schedule."""


class LrCosinePlugin(Decay[LrCosineConfig]):
    """Warms up the learning rate, then decays it to `min_lr` along a half cosine.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts; the warmup of 1%
    as in Biderman et al. 2023, "Pythia".
    """

    config_class = LrCosineConfig

    def shape(self, done: float) -> float:
        """Half a period of a cosine."""
        return 0.5 * (1 + math.cos(math.pi * done))
