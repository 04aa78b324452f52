"""The linear schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nexus_core import Engine
from nexus_plugins.lr_linear import LrLinearPlugin


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (4, 0.2), (12, 0.5)])
def test_rises_and_falls_along_straight_lines(warmup: int, floor: float) -> None:
    """Fails if a corner of the schedule is at another step, compared with interpolation."""
    model = nn.Linear(2, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        loss=lambda m, b: m(b).mean() * 0,
        plugins=[LrLinearPlugin(warmup=warmup, min_lr=0.5 * floor)],
    )
    steps = engine.steps([torch.ones(1, 2)], until="20 steps")
    got = [engine.optimizer.param_groups[0]["lr"] for _ in steps]
    done = np.arange(20)
    rise = np.minimum(1, (done + 1) / warmup) if warmup else np.ones(20)
    fall = np.interp(done, [warmup, 20], [1, floor])
    assert got == pytest.approx(list(0.5 * rise * fall))


def test_defaults_are_as_documented() -> None:
    """Fails if a default changes: runs would silently train differently."""
    config = LrLinearPlugin().config
    assert (str(config.warmup), config.min_lr) == ("6%", 1e-5)
