"""The inverse square root."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nexus_core import ConfigError, Engine
from nexus_plugins.lr_rsqrt import LrRsqrtPlugin


def rates(until: str, **config: Any) -> list[float]:
    model = nn.Linear(2, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=2.0),
        loss=lambda m, b: m(b).mean() * 0,
        plugins=[LrRsqrtPlugin(**config)],
    )
    data = [torch.ones(2, 2)]
    return [engine.optimizer.param_groups[0]["lr"] for _ in engine.steps(data, until=until)]


def test_follows_the_formula_of_the_paper() -> None:
    """Fails if warm-up and decay do not meet: equation 3 with the peak at the base rate."""
    got = rates("40 steps", warmup=8)
    noam = [2.0 * min((done + 1) / 8, (8 / max(done, 1)) ** 0.5) for done in range(40)]
    assert got == pytest.approx(noam)
    assert got[32] == pytest.approx(1.0), "half the base at four times the timescale"


def test_the_timescale_may_be_longer_than_the_warmup_and_in_another_unit() -> None:
    """Fails if the timescale is ignored: 10 rows are 5 steps."""
    got = rates("20 steps", warmup=2, timescale="10 samples")
    expected = [2.0 * min(1, (done + 1) / 2) * (5 / max(done, 5)) ** 0.5 for done in range(20)]
    assert got == pytest.approx(expected)


def test_it_does_not_depend_on_the_horizon() -> None:
    """Fails if an extended run has other rates than one planned longer."""
    assert rates("30 steps", warmup=4)[:15] == rates("15 steps", warmup=4)


def test_without_any_timescale_it_is_refused() -> None:
    """Fails if a missing timescale is not reported."""
    with pytest.raises(ConfigError, match=r"needs a timescale"):
        rates("5 steps", warmup=None)
