"""The constant schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nexus_core import ConfigError, Engine
from nexus_plugins.lr_constant import LrConstantPlugin


def rates(plugin: LrConstantPlugin, until: str) -> list[float]:
    model = nn.Linear(2, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        loss=lambda m, b: m(b).mean() * 0,
        plugins=[plugin],
    )
    data = [torch.ones(1, 2)]
    return [engine.optimizer.param_groups[0]["lr"] for _ in engine.steps(data, until=until)]


def test_warms_up_and_stays() -> None:
    """Fails if the rate changes after the warm-up, or the warm-up ends late."""
    assert rates(LrConstantPlugin(warmup="4 steps"), "8 steps") == pytest.approx(
        [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    )


@pytest.mark.parametrize("none", [0, "0", "0 steps", "0%", None])
def test_there_may_be_no_warmup(none: object) -> None:
    """Fails if usual ways to write "none" are rejected."""
    assert rates(LrConstantPlugin(warmup=none), "2 steps") == [0.5, 0.5]


def test_the_default_warmup_is_a_share_of_any_run() -> None:
    """Fails if a run of one step is refused, or trains at a rate of zero."""
    assert rates(LrConstantPlugin(), "1 steps") == [0.5]
    assert rates(LrConstantPlugin(), "1 tokens") == [0.5]
    assert rates(LrConstantPlugin(), "300 steps")[:3] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    with pytest.raises(ConfigError, match=r"lr_constant\.warmup is 1000 steps, longer.*10%"):
        rates(LrConstantPlugin(warmup="1000 steps"), "10 steps")
