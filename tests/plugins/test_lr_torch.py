"""Schedulers of PyTorch: the same rates as in a plain loop, resumed or not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from nexus_core import ConfigError, Engine
from nexus_plugins.lr_torch import LrTorchPlugin
from nexus_plugins.schedule import SchedulePlugin

CASES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 3, "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [2, 5], "gamma": 0.1}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
    ("PolynomialLR", {"total_iters": 10, "power": 2.0}),
    ("OneCycleLR", {"max_lr": 2.0, "total_steps": 12, "cycle_momentum": False}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3, "cycle_momentum": False}),
]


def engine_of(name: str, settings: dict[str, Any], *others: SchedulePlugin) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}], lr=0.5
    )
    plugin = LrTorchPlugin(scheduler=name, settings=settings)
    return Engine(model, optimizer, loss=lambda m, b: m(b).mean(), plugins=[plugin, *others])


def rates(engine: Engine, until: int) -> list[float]:
    data = [torch.ones(1, 2)]
    return [engine.optimizer.param_groups[0]["lr"] for _ in engine.steps(data, until=until)]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_rates_are_those_of_a_plain_loop(name: str, settings: dict[str, Any]) -> None:
    """Breaks if the scheduler turns too early, too late, or from another base."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = getattr(lr_scheduler, name)(optimizer, **settings)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 12:
            scheduler.step()
    engine = engine_of(name, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rates(engine, 12) == pytest.approx(expected)
    first, second = (group["lr"] for group in engine.optimizer.param_groups)
    assert second == pytest.approx(first / 10), "groups keep their ratio"


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_resumed_run_has_the_same_rates(name: str, settings: dict[str, Any]) -> None:
    """Breaks if the scheduler starts anew after a crash."""
    whole, first, second = (engine_of(name, settings) for _ in range(3))
    expected = rates(whole, 12)
    rates(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert rates(second, 12) == expected[5:]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_resumed_run_has_the_same_rates_where_the_base_moves(
    name: str, settings: dict[str, Any]
) -> None:
    """Breaks if the base of the first day is taken from where a rule has brought it since."""
    rule = {"target": "optimizer.lr", "start": 0.5, "end": 0.1, "over": "10 steps"}
    whole, first, second = (
        engine_of(name, settings, SchedulePlugin(rules=[rule])) for _ in range(3)
    )
    expected = rates(whole, 12)
    rates(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert rates(second, 12) == expected[5:]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("StepLr", {}, r"is 'StepLr', which is no schedule.*Did you mean 'StepLR'"),
        ("ReduceLROnPlateau", {}, "is 'ReduceLROnPlateau', which is no schedule over steps"),
        ("StepLR", {"size": 3}, r"StepLR does not take the settings.*it takes step_size, gamma"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    """Breaks if a misspelt scheduler or setting ends in a traceback, or in silence."""
    with pytest.raises(ConfigError, match=words):
        rates(engine_of(name, settings), 2)
