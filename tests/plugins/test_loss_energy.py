"""The energy module's loss compared with numpy, its units, metric and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core.engine import Engine
from nexus_core.errors import ConfigError, DataError
from nexus_plugins.loss_energy import LossEnergyPlugin
from nexus_plugins.model_nexus.nexus import NEXUSOutput


def output(**reports):
    return NEXUSOutput(torch.empty(0), torch.empty(0), reports)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999))
def test_classical_loss_and_units_match_numpy(seed):
    """Fails if the formula differs from the documented one."""
    numbers = np.random.default_rng(seed)
    energy, iterations = numbers.normal(size=(2, 4)), numbers.uniform(1, 9, (2, 4))
    labels = np.array([[1, 2, 3, 4], [1, 2, -100, -100]])
    real = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=bool)
    expected = (energy[real] + 0.01 * np.abs(iterations[real] - 5)).sum()
    batch = {"input_ids": torch.zeros(2, 4), "labels": torch.from_numpy(labels)}
    report = {"final_energy": torch.from_numpy(energy), "iterations": torch.from_numpy(iterations)}
    plugin = LossEnergyPlugin(classic=True)
    assert plugin.units(batch) == 7
    np.testing.assert_allclose(plugin.loss(batch, output(energy=report)).item(), expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999))
def test_loss_and_units_match_numpy(seed):
    """Fails if the formula differs from the documented one."""
    numbers = np.random.default_rng(seed)
    early, last = numbers.normal(size=(2, 2, 4, 5))
    head, foreseen = numbers.normal(size=(6, 5)), numbers.normal(size=(2, 4))
    labels = np.array([[1, 2, 3, 4], [1, 2, -100, -100]])

    def chances(states):
        logits = states @ head.T
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    cost = (chances(last) * np.log(chances(last) / chances(early))).sum(-1)
    each = cost + np.exp(foreseen) - cost - cost * (foreseen - np.log(cost))
    batch = {"input_ids": torch.zeros(2, 4), "labels": torch.from_numpy(labels)}
    report = {"early": torch.from_numpy(early), "foreseen": torch.from_numpy(foreseen)}
    result = NEXUSOutput(torch.from_numpy(last), torch.from_numpy(head), {"energy": report})
    plugin = LossEnergyPlugin()
    assert plugin.units(batch) == 7
    expected = each[labels != -100].sum()
    np.testing.assert_allclose(plugin.loss(batch, result).item(), expected, rtol=1e-5)


def test_a_prediction_far_off_has_a_finite_loss_that_says_so():
    """Fails if a predicted cost of e^100 nats overflows, or labels of another shape pass."""
    states, foreseen = torch.zeros(1, 2, 5), torch.tensor([[100.0, -100.0]], requires_grad=True)
    report = {"early": states, "foreseen": foreseen}
    result = NEXUSOutput(states, torch.ones(6, 5), {"energy": report})
    batch = {"input_ids": torch.zeros(1, 2), "labels": torch.ones(1, 2, dtype=torch.long)}
    loss = LossEnergyPlugin().loss(batch, result)
    loss.backward()
    assert loss.item() == pytest.approx(np.exp(5) * 96)
    np.testing.assert_allclose(foreseen.grad, [[np.exp(5), 0]], rtol=1e-5, atol=1e-9)
    with pytest.raises(DataError, match=r"labels have shape \(1, 1\).*one label per position"):
        LossEnergyPlugin().loss({**batch, "labels": batch["labels"][:, 1:]}, result)


def test_early_refinements_learn_from_the_last_and_not_the_reverse():
    """Fails if the model's prediction is drawn towards an early one, or ignored labels count."""
    early, last, foreseen = (torch.randn(1, 3, 5, requires_grad=True) for _ in range(3))
    foreseen = foreseen[..., 0].detach().requires_grad_()
    report = {"early": early, "foreseen": foreseen}
    result = NEXUSOutput(last, torch.randn(6, 5), {"energy": report})
    batch = {"input_ids": torch.zeros(1, 3), "labels": torch.tensor([[1, -100, 2]])}
    LossEnergyPlugin().loss(batch, result).backward()
    assert last.grad is None
    assert early.grad is not None
    assert early.grad.abs().sum(-1).gt(0).tolist() == [[True, False, True]]
    with torch.no_grad():
        own, other = (states @ result.head_weight.T for states in (early, last))
        cost = F.kl_div(own.log_softmax(-1), other.softmax(-1), reduction="none").sum(-1)
    assert foreseen.grad is not None
    expected = (foreseen.exp() - cost) * torch.tensor([[1, 0, 1]])
    torch.testing.assert_close(foreseen.grad, expected)


@pytest.mark.parametrize("classic", [False, True])
def test_a_model_of_the_other_kind_is_named(classic):
    """Fails if the user gets a KeyError instead of what to change."""
    report = {"refinements": torch.ones(1, 3), "iterations": torch.ones(1, 3)}
    report |= {"early": torch.ones(1, 3, 1)} if classic else {"final_energy": torch.ones(1, 3)}
    with pytest.raises(ConfigError, match="must both be classic, or neither"):
        LossEnergyPlugin(classic=classic).loss(
            {"input_ids": torch.zeros(1, 3)}, output(energy=report)
        )


class Settler(nn.Module):
    """Reports a learned expected number of refinements, and makes two or four."""

    active_modules: tuple[str, ...] = ("energy",)

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.tensor(8.0))

    def forward(self, input_ids):
        made = torch.full(input_ids.shape, 4.0)
        made[:, 0] = 2.0
        iterations = self.count.expand(input_ids.shape)
        report = {"final_energy": 0 * iterations, "iterations": iterations, "refinements": made}
        return output(energy=report)


def test_training_aims_at_the_target_and_logs_the_iterations():
    """Fails if iterations do not approach their target, or the metric is not the mean."""
    model = Settler()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    plugin = LossEnergyPlugin(weight=1.0, classic=True)
    engine = Engine(model, optimizer, plugins=[plugin], accumulate=2)
    batches = [{"input_ids": torch.zeros(1, length)} for length in (1, 3)]
    engine.fit(batches, until="1 steps")
    assert model.count.item() == pytest.approx(8 - 10 * 0.01)
    assert engine.metrics["energy/avg_iterations"] == pytest.approx((2 + 2 + 4 + 4) / 4)


@pytest.mark.parametrize("active", [(), ("energy",)])
def test_a_model_without_the_module_is_refused(active):
    """Fails if the user gets a KeyError, or nothing, instead of the setting to enable."""
    model = Settler()
    model.active_modules = active
    model.forward = lambda input_ids: output(world=model.count)
    engine = Engine(model, torch.optim.SGD(model.parameters()), plugins=[LossEnergyPlugin()])
    with pytest.raises(ConfigError, match=r"ModelNexusPlugin\(energy=True\).*LossEnergyPlugin"):
        engine.fit([{"input_ids": torch.zeros(1, 3)}], until="1 steps")


def test_defaults_are_those_of_the_full_model():
    """Fails if a default of the documented table has changed."""
    assert LossEnergyPlugin().config.weight == 0.1
    config = LossEnergyPlugin(classic=True).config
    assert (config.weight, config.iteration_weight, config.target_iterations) == (0.05, 0.01, 5)
