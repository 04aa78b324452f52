"""Warmup, stable, decay: the learning rate only decays at the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from nexus_core import ConfigError, Interval, IntervalField, hookimpl
from nexus_core.bases.schedule import Decay, DecayConfig, amount_in
from nexus_core.intervals import Exact, within

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["LrWsdConfig", "LrWsdPlugin"]

LAST_FIFTH = Interval(20, "%")


class LrWsdConfig(DecayConfig):
    """Settings of warm-up, stable, decay."""

    decay: IntervalField | None = Field(
        default=LAST_FIFTH,
        description="length of the decay at the end; null: the last fifth of the run",
    )
    shape: Literal["sqrt", "linear"] = Field(
        default="sqrt", description="decay shape: 1 - sqrt(share done), or linear"
    )


class LrWsdPlugin(Decay[LrWsdConfig]):
    """Warms up the learning rate, holds it, and decays it to `min_lr` at the very end.

    Until the decay starts, the rate does not depend on the end of the run. So a checkpoint of the
    stable phase can be resumed with a later horizon as if planned, and one such run yields models
    of many lengths.

    Source: Hu et al. 2024, "MiniCPM", section 4.2; the root: Hägele et al. 2024, "Scaling Laws
    and Compute-Optimal Training Beyond Fixed Training Durations", equation 1.
    """

    config_class = LrWsdConfig

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Reject a decay that does not fit between the warmup and the horizon.

        Raises:
            ConfigError: it does not fit, or its unit cannot be converted to the horizon's.
        """
        super().on_start(engine)
        horizon, warmup = engine.horizon, self.config.warmup
        if horizon is None:
            return
        fall, decay = self._fall(engine, horizon), self.config.decay or LAST_FIFTH
        rise = amount_in(horizon.unit, warmup, engine) or 0 if warmup else 0
        if rise + fall > horizon.exact:
            raise ConfigError(
                f"lr_wsd: a warmup of {warmup} and a decay of {decay} do not fit into a run of "
                f"{horizon}; shorten one of them, or train longer"
            )

    def scale(self, engine: Engine) -> float:
        """The base learning rate until the decay, then down to the minimum."""
        horizon = engine.horizon
        if horizon is None:
            return 1.0
        fall = self._fall(engine, horizon)
        done = engine.state.exactly(horizon.unit) - (horizon.exact - fall)
        floor = self.floor(engine)
        return floor + (1 - floor) * self.shape(within(done / fall))

    def shape(self, done: float) -> float:
        """The decay curve, from 1 to 0."""
        return 1 - (math.sqrt(done) if self.config.shape == "sqrt" else done)

    def _fall(self, engine: Engine, horizon: Interval) -> Exact:
        """The length of the decay in the unit of the horizon."""
        amount = amount_in(horizon.unit, self.config.decay or LAST_FIFTH, engine)
        if amount is None:
            raise ConfigError(
                f"lr_wsd.decay is {self.config.decay}, but the run lasts {horizon}; the decay "
                f"ends with the run, so give it in {horizon.unit}, or as a share of the run"
            )
        return amount
