"""Inverse square root decay of the learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from nexus_core import ConfigError, Interval, IntervalField, hookimpl
from nexus_core.bases.schedule import WARMUP, Schedule, ScheduleConfig, Warmup
from nexus_core.errors import hint_set

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["LrRsqrtConfig", "LrRsqrtPlugin"]


class LrRsqrtConfig(ScheduleConfig):
    """Settings of the inverse square root."""

    warmup: Warmup = Field(default=Interval(4, "%"), description=WARMUP)
    timescale: IntervalField | None = Field(
        default=None, description="the rate is halved at four times this; null: the warmup length"
    )


class LrRsqrtPlugin(Schedule[LrRsqrtConfig]):
    """Warms up the learning rate, then decays it as `sqrt(timescale / time)`.

    The rate stays at its base until the timescale has passed. With a warmup in steps it does not
    depend on the horizon, so a run can be stopped or extended at any time.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 3, with the peak as base;
    their warmup is 4,000 of 100,000 steps.
    """

    config_class = LrRsqrtConfig

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Reject a run without a timescale.

        Raises:
            ConfigError: neither a timescale nor a warmup is set.
        """
        super().on_start(engine)
        if self.config.timescale is None and self.config.warmup is None:
            raise ConfigError(
                "lr_rsqrt without a warmup needs a timescale; set one, for instance with ",
                hint_set("lr_rsqrt.timescale", "1000 steps"),
            )

    def scale(self, engine: Engine) -> float:
        """`sqrt(timescale / time)`, at most 1."""
        given = self.config.timescale or self.config.warmup
        if given is None:
            return 1.0
        timescale = given.of(engine.horizon)
        done = engine.state.exactly(timescale.unit)
        return math.sqrt(timescale.exact / max(done, timescale.exact))
