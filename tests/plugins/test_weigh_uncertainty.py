"""Weighing by uncertainty: the gradient of its objective, and where it converges."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from nexus_core import Engine, Loss, LossConfig
from nexus_plugins.weigh_uncertainty import WeighUncertaintyPlugin


class FixedPlugin(Loss[LossConfig]):
    """A term with a constant value."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.name = self.term = name  # type: ignore[misc]
        self.value = value

    def units(self, batch: Tensor) -> float:
        return 1.0

    def loss(self, batch: Tensor, output: Tensor) -> Tensor:
        return self.value + 0 * output.sum()


def engine_of(plugin: WeighUncertaintyPlugin, **values: float) -> Engine:
    model = nn.Linear(1, 1)
    terms = [FixedPlugin(name, value) for name, value in values.items()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return Engine(model, optimizer, plugins=[plugin, *terms], log_every=1)


def log_variance(plugin: WeighUncertaintyPlugin, name: str) -> float:
    return float(cast(dict[str, Tensor], plugin.state_dict()["log_variances"])[name])


@pytest.mark.parametrize("loss", [0.3, 1.0, 1.7])
def test_a_step_is_gradient_descent_on_the_papers_objective(loss: float) -> None:
    """Fails if the closed-form gradient is not that of `exp(-s) * loss + s`."""
    s = torch.tensor(0.0, requires_grad=True)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(torch.exp(-s) * loss + s, s)
        s = (s - 0.05 * gradient).detach().requires_grad_()
    plugin = WeighUncertaintyPlugin(lr=0.05)
    engine_of(plugin, one=loss).fit([torch.ones(1, 1)], until="3 steps")
    assert log_variance(plugin, "one") == pytest.approx(s.item(), abs=1e-6)


def test_settles_where_each_term_counts_one() -> None:
    """Fails if very different scales are not balanced, or oscillate."""
    plugin = WeighUncertaintyPlugin(lr=0.1)
    result = engine_of(plugin, tiny=0.01, huge=500.0).fit([torch.ones(1, 1)], until="200 steps")
    assert result.metrics["weight/tiny"] == pytest.approx(100, rel=0.02)
    assert result.metrics["weight/huge"] == pytest.approx(1 / 500, rel=0.02)
    assert log_variance(plugin, "huge") == pytest.approx(math.log(500), abs=0.02)


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    """Fails if one overflow makes all later weights nan."""
    plugin = WeighUncertaintyPlugin()
    engine_of(plugin, bad=float("nan"), good=1.0).fit([torch.ones(1, 1)], until="3 steps")
    assert log_variance(plugin, "bad") == 0.0
    assert log_variance(plugin, "good") == 0.0


@pytest.mark.parametrize("loss", [-0.5, 0.0])
def test_a_loss_that_is_not_positive_keeps_its_weight(loss: float) -> None:
    """Fails if a negative term (an energy) increases its weight without bound."""
    plugin = WeighUncertaintyPlugin()
    engine_of(plugin, energy=loss, good=2.0).fit([torch.ones(1, 1)], until="50 steps")
    assert log_variance(plugin, "energy") == 0.0
    assert log_variance(plugin, "good") > 0.3
