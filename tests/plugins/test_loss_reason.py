"""The reasoner's loss compared with numpy, its units, metric and errors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_plugins.loss_reason import LossReasonPlugin
from nexus_plugins.model_nexus.nexus import NEXUSOutput


def output(**reports):
    return NEXUSOutput(torch.empty(0), torch.empty(0), reports)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), sharpness=st.sampled_from([0.0, 1.0, 100.0]))
def test_loss_and_units_match_scipy(seed, sharpness):
    """Fails if the formula differs from the documented one."""
    numbers = np.random.default_rng(seed)
    rules = scipy.special.softmax(sharpness * numbers.normal(size=(2, 4, 3, 6)), -1)
    halting = numbers.dirichlet(np.ones(3), size=(2, 4))
    labels = np.array([[1, 2, 3, -100], [1, -100, -100, -100]])
    real = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    entropy = scipy.stats.entropy(rules, axis=-1)
    per_position_and_step = 0.1 * np.mean(
        [halting[place][step] * entropy[place][step] for place in real for step in range(3)]
    )
    batch = {"input_ids": torch.zeros(2, 4), "labels": torch.from_numpy(labels)}
    reports = output(reason=torch.from_numpy(rules), reason_halting=torch.from_numpy(halting))
    plugin = LossReasonPlugin(classic=True)
    assert plugin.units(batch) == len(real)
    mean = plugin.loss(batch, reports) / plugin.units(batch)
    np.testing.assert_allclose(mean.item(), per_position_and_step, atol=1e-8)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda reports: {"logits": None, "module_outputs": reports},
        lambda reports: (torch.zeros(1, 2, 3), {"module_outputs": reports}),
        lambda reports: [output(**reports)],
    ],
    ids=["dict", "tuple", "list"],
)
def test_reports_are_found_in_whatever_a_model_returns(wrap):
    """Fails if custom models must return objects, or are said to have no module."""
    reports = {"reason": torch.full((1, 2, 1, 4), 0.25), "reason_halting": torch.ones(1, 2, 1)}
    batch = {"input_ids": torch.zeros(1, 2)}
    plugin = LossReasonPlugin(classic=True)
    assert torch.equal(plugin.loss(batch, wrap(reports)), plugin.loss(batch, output(**reports)))
    with pytest.raises(ConfigError, match=r"needs .*'reason'.*got a .*, with module_outputs: none"):
        plugin.loss(batch, wrap({}))


def test_a_certain_choice_has_no_loss_and_a_finite_gradient():
    """Fails if a certain choice results in nan."""
    rules = torch.tensor([0.0, 1.0, 0.0]).expand(1, 2, 1, 3).clone().requires_grad_()
    batch = {"input_ids": torch.zeros(1, 2)}
    loss = LossReasonPlugin(classic=True).loss(
        batch, output(reason=rules, reason_halting=torch.ones(1, 2, 1))
    )
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert rules.grad.isfinite().all()


class Chooser(nn.Module):
    """Halts after two of three steps, half of the time."""

    active_modules: tuple[str, ...] = ("reason",)

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.arange(4.0))

    def forward(self, input_ids):
        shape = input_ids.shape
        rules = self.scores.softmax(0).expand(*shape, 3, 4)
        halting = torch.tensor([0.0, 0.5, 0.5]).expand(*shape, 3)
        return output(reason=rules, reason_halting=halting)


def test_training_lowers_the_entropy_and_logs_the_proof_length():
    """Fails if the term changes in the wrong direction, or its metric is not the expected steps."""
    model = Chooser()
    entropy = scipy.stats.entropy(model.scores.softmax(0).detach().numpy())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = Engine(
        model, optimizer, plugins=[LossReasonPlugin(weight=1.0, classic=True)], accumulate=2
    )
    batches = [{"input_ids": torch.zeros(2, length)} for length in (3, 5, 2, 7)]
    engine.fit(batches, until="2 steps")
    assert engine.metrics["reasoning/proof_length"] == pytest.approx(2.5)
    assert scipy.stats.entropy(model.scores.softmax(0).detach().numpy()) < entropy


@pytest.mark.parametrize("active", [(), ("reason",)])
def test_a_model_without_the_module_is_refused(active):
    """Fails if the user gets a KeyError, or nothing, instead of the setting to enable."""
    model = Chooser()
    model.active_modules = active
    model.forward = lambda input_ids: output(world=model.scores)
    engine = Engine(model, torch.optim.SGD(model.parameters()), plugins=[LossReasonPlugin()])
    with pytest.raises(ConfigError, match=r"ModelNexusPlugin\(reason=True\).*LossReasonPlugin"):
        engine.fit([{"input_ids": torch.zeros(1, 3)}], until="1 steps")


def test_defaults_are_those_of_the_full_model():
    """Fails if a default of the documented table has changed."""
    config = LossReasonPlugin(classic=True).config
    assert (config.weight, config.entropy_weight, config.eps) == (0.05, 0.1, 1e-10)
    config = LossReasonPlugin().config
    assert (config.weight, config.balance_weight, config.rate) == (0.05, 0.01, 0.3)
    with pytest.raises(ConfigError, match="entropy_weight has no effect with classic=false"):
        LossReasonPlugin(entropy_weight=0.2)
    with pytest.raises(ConfigError, match="rate has no effect with classic=true"):
        LossReasonPlugin(classic=True, rate=0.2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), rate=st.sampled_from([0.1, 0.5]))
def test_balance_matches_scipy(seed, rate):
    """Fails if the formula differs from the documented one."""
    numbers = np.random.default_rng(seed)
    firing, used = numbers.uniform(size=(2, 3, 5)), numbers.uniform(0.05, 0.95, size=5)
    labels = torch.tensor([[1, 2, -100], [1, -100, -100]])
    real = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    logit = scipy.special.logit
    each = [
        scipy.stats.bernoulli.entropy(fired) / 4
        + scipy.special.rel_entr([m, 1 - m], [rate, 1 - rate]).sum()
        for place in real
        for fired, m in zip(firing[place], used, strict=True)
    ]
    plugin = LossReasonPlugin(rate=rate, balance_weight=0.5)
    plugin.load_state_dict({"rates": torch.from_numpy(used)})
    batch = {"input_ids": torch.zeros(2, 3), "labels": labels}
    told = torch.from_numpy(firing).requires_grad_()
    loss = plugin.loss(batch, output(reason=told))
    loss.backward()
    np.testing.assert_allclose(loss.item(), 0.5 * sum(each))
    slope = (logit(used) - logit(rate)) - logit(firing) / 4
    np.testing.assert_allclose(told.grad[0].numpy(), 0.5 * slope[0])


class Firing(nn.Module):
    """Three rules: one that hardly ever fires, one that nearly always does, one in between."""

    active_modules: tuple[str, ...] = ("reason",)

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([0.1, 0.1, 4.0]))
        self.biases = nn.Parameter(torch.tensor([-5.0, 5.0, -1.0]))

    def forward(self, input_ids):
        firing = (input_ids.unsqueeze(-1) * self.slopes + self.biases).sigmoid()
        return output(reason=firing)


def fired(accumulate, steps, optimizer=torch.optim.Adam, **options):
    """The mean firing of each rule after some training, and the run."""
    model = Firing()
    plugin = LossReasonPlugin(weight=1.0, balance_weight=1.0, decay=0.9)
    rows = torch.randn(8 * steps, 3, generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in rows.split(8 // accumulate)]
    given = {"lr": 0.05, "eps": 1e-3} if optimizer is torch.optim.Adam else {"max_iter": 4}
    engine = Engine(
        model,
        optimizer(model.parameters(), **given),
        plugins=[plugin],
        accumulate=accumulate,
        **options,
    )
    engine.fit(batches, until=f"{steps} steps")
    return model(rows).module_outputs["reason"].mean((0, 1)), model, plugin


def test_no_rule_stays_idle_or_fires_always_and_no_split_of_a_step_matters():
    """Fails if the loss rewards collapse, or the balance depends on micro-batches."""
    before = Firing()(torch.randn(99, 3)).module_outputs["reason"].mean((0, 1))
    assert before[0] < 0.01
    assert before[1] > 0.99
    after, _, plugin = fired(1, 300)
    assert ((after > 0.1) & (after < 0.6)).all(), after
    assert plugin.state_dict()["rates"].allclose(after, atol=0.1)
    whole, parts = fired(1, 20)[1:], fired(4, 20)[1:]
    for one, other in zip(whole[0].parameters(), parts[0].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(
        whole[1].state_dict()["rates"].round(decimals=4),
        parts[1].state_dict()["rates"].round(decimals=4),
    )


def test_a_pass_that_is_made_again_counts_once():
    """LBFGS computes the gradient of a step several times; the rates are those of one pass."""
    _, _, plugin = fired(2, 1, torch.optim.LBFGS)
    rates = plugin.state_dict()["rates"]
    assert ((rates >= 0) & (rates <= 1)).all(), rates
