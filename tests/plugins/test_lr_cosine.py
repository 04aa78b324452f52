"""The cosine schedule, and what all decaying schedules share."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core import ConfigError, Engine
from nexus_plugins.lr_cosine import LrCosinePlugin


def rates(plugin: LrCosinePlugin, until: str, lr: float = 1.0, batches: int = 4) -> list[float]:
    """The optimizer's learning rate in each step of a run."""
    model = nn.Linear(2, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        loss=lambda m, b: m(b).mean() * 0,
        plugins=[plugin],
    )
    data = [torch.ones(2, 2)] * batches
    return [engine.optimizer.param_groups[0]["lr"] for _ in engine.steps(data, until=until)]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(0, 50), st.floats(0, 0.9))
def test_every_step_is_that_of_torchs_schedulers(steps: int, warmup: int, floor: float) -> None:
    """Fails if warm-up or cosine is off by one step or by the floor."""
    assume(warmup < steps)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=floor)
    expected = [min(1.0, (step + 1) / warmup) for step in range(warmup)]
    for _ in range(steps - warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    got = rates(LrCosinePlugin(warmup=warmup, min_lr=floor), f"{steps} steps")
    assert got == pytest.approx(expected, abs=1e-9)


def test_the_first_step_already_learns() -> None:
    """Fails if warm-up starts at zero, which wastes a step."""
    assert rates(LrCosinePlugin(warmup="10 steps", min_lr=0), "20 steps")[0] == pytest.approx(0.1)


def test_a_horizon_in_tokens_counts_tokens() -> None:
    """Fails if the decay counts steps if the run counts something else: 2 rows per step."""
    got = rates(LrCosinePlugin(warmup=0, min_lr=0), "20 tokens")
    assert got == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])


def test_a_warmup_in_another_unit_multiplies_the_beginning() -> None:
    """Fails if units that do not convert are mixed up: 4 steps of a run of 20 tokens."""
    got = rates(LrCosinePlugin(warmup="4 steps", min_lr=0), "20 tokens")
    cosine = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert got == pytest.approx([c * min(1, (s + 1) / 4) for s, c in enumerate(cosine)])


def test_an_epoch_of_warmup_is_as_long_as_its_steps() -> None:
    """Fails if epochs are not converted to steps if the data has a length (4 batches)."""
    by_epoch = rates(LrCosinePlugin(warmup="1 epoch", min_lr=0), "12 steps")
    by_steps = rates(LrCosinePlugin(warmup="4 steps", min_lr=0), "12 steps")
    assert by_epoch == pytest.approx(by_steps)


def test_the_floor_is_the_first_groups_and_ratios_stay() -> None:
    """Fails if `min_lr` lifts a group with a smaller rate above its share."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.01}], lr=1.0
    )
    engine = Engine(
        model,
        optimizer,
        loss=lambda m, b: m(b).mean() * 0,
        plugins=[LrCosinePlugin(warmup=0, min_lr=0.1)],
    )
    for _ in engine.steps([torch.ones(1, 2)], until="8 steps"):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 100)
    assert 0.1 < first < 0.2


@pytest.mark.parametrize(
    ("warmup", "until"),
    [("30 steps", "20 steps"), ("6 epochs", "20 steps"), ("9 steps", "2 epochs")],
)
def test_a_warmup_longer_than_the_run_is_refused_before_training(warmup: str, until: str) -> None:
    """Fails if a run can end before reaching its learning rate."""
    with pytest.raises(ConfigError, match=rf"lr_cosine\.warmup is {warmup}, longer") as caught:
        rates(LrCosinePlugin(warmup=warmup, min_lr=0), until)
    assert "LrCosinePlugin(warmup=" in str(caught.value)


def test_a_floor_above_the_base_is_refused() -> None:
    """Fails if the learning rate could rise instead of falling."""
    with pytest.raises(ConfigError, match=r"lr_cosine\.min_lr is 0\.1, above .* 0\.01"):
        rates(LrCosinePlugin(warmup=0, min_lr=0.1), "5 steps", lr=0.01)


def test_a_resumed_run_has_the_same_rates() -> None:
    """Fails if the schedule depends on anything but progress."""
    model = nn.Linear(2, 1)

    def fresh() -> Engine:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        plugins = [LrCosinePlugin(warmup=3, min_lr=0)]
        return Engine(model, optimizer, loss=lambda m, b: m(b).mean() * 0, plugins=plugins)

    data = [torch.ones(1, 2)] * 3
    first, second = fresh(), fresh()
    for state in first.steps(data, until="9 steps"):
        if state.step == 5:
            break
    second.load_state_dict(first.state_dict())
    resumed = [second.optimizer.param_groups[0]["lr"] for _ in second.steps(data, until="9 steps")]
    assert resumed == rates(LrCosinePlugin(warmup=3, min_lr=0), "9 steps")[5:]
