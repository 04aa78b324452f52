"""GradNorm: balanced gradients at its fixed point, for every split of a step."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, Interval, Loss, LossConfig
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.weigh_gradnorm import WeighGradnormPlugin
from tiny import Reads


class Shared(nn.Module):
    """A trunk and a head for each of two terms."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 3)
        self.heads = nn.ModuleDict({"one": nn.Linear(3, 1), "two": nn.Linear(3, 1)})

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.trunk(batch))
        return {name: head(hidden) for name, head in self.heads.items()}


class HeadPlugin(Loss[LossConfig]):
    """The mean square of a head's output, times a factor."""

    def __init__(self, name: str, factor: float, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.name = self.term = name  # type: ignore[misc]
        self.factor = factor

    def units(self, batch: Tensor) -> float:
        return float(len(batch))

    def loss(self, batch: Tensor, output: dict[str, Tensor]) -> Tensor:
        return self.factor * output[self.term].square().sum()


BATCH = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).double()
FACTORS = {"one": 1.0, "two": 1000.0}


def engine_of(plugin: WeighGradnormPlugin, weight: float = 1.0, **more: Any) -> Engine:
    torch.manual_seed(0)
    model = Shared().double()
    terms = [HeadPlugin("one", 1.0, weight), HeadPlugin("two", 1000.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return Engine(model, optimizer, plugins=[plugin, *terms], log_every=1, **more)


def weights_of(plugin: WeighGradnormPlugin) -> dict[str, float]:
    weights = cast(dict[str, Tensor], plugin.state_dict()["weights"])
    return {name: float(weight) for name, weight in weights.items()}


def trunk_norms(model: nn.Module) -> dict[str, float]:
    """The gradient norm of each unweighted term in the trunk, found with `backward`."""
    norms = {}
    for name, factor in FACTORS.items():
        model.zero_grad()
        (factor * model(BATCH)[name].square().mean()).backward()
        norms[name] = float(torch.cat([p.grad.flatten() for p in model.trunk.parameters()]).norm())
    return norms


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_at_the_fixed_point_weighted_gradients_follow_the_training_rates(alpha: float) -> None:
    """Fails if norms, rates or alpha are not used as in equation 1 of the paper."""
    plugin = WeighGradnormPlugin(alpha=alpha, lr=1.0, every=1)
    engine = engine_of(plugin)
    losses = {n: f * engine.model(BATCH)[n].square().mean().detach() for n, f in FACTORS.items()}
    plugin.load_state_dict(
        {"weights": {}, "first_losses": {"one": 2 * losses["one"], "two": losses["two"]}}
    )
    engine.fit([BATCH], until="1 step")
    weights, norms = weights_of(plugin), trunk_norms(engine.model)
    assert sum(weights.values()) == pytest.approx(2)
    pull = {name: weights[name] * norms[name] for name in FACTORS}
    assert pull["one"] / pull["two"] == pytest.approx(0.5**alpha, rel=1e-4)


def test_a_term_that_began_below_zero_counts_as_training_at_the_common_rate() -> None:
    """Fails if a loss that falls from -1 to -2 is treated as one that doubles."""
    plugin = WeighGradnormPlugin(alpha=1.5, lr=1.0, every=1)
    engine = engine_of(plugin)
    one = engine.model(BATCH)["one"].square().mean().detach()
    first = {"one": -one / 2, "two": 1000 * engine.model(BATCH)["two"].square().mean().detach()}
    plugin.load_state_dict({"weights": {}, "first_losses": first})
    engine.fit([BATCH], until="1 step")
    weights, norms = weights_of(plugin), trunk_norms(engine.model)
    assert weights["one"] * norms["one"] == pytest.approx(weights["two"] * norms["two"], rel=1e-4)


def test_an_own_weight_is_the_share_of_the_gradient() -> None:
    """Fails if balancing overrides the user's weight."""
    plugin = WeighGradnormPlugin(alpha=0.0, lr=1.0, every=1)
    engine = engine_of(plugin, weight=3.0)
    engine.fit([BATCH], until="1 step")
    weights, norms = weights_of(plugin), trunk_norms(engine.model)
    assert weights["one"] * norms["one"] == pytest.approx(3 * weights["two"] * norms["two"])


def test_smaller_steps_come_to_the_same_point() -> None:
    """Fails if weights oscillate, become negative or do not reach balance."""
    plugin = WeighGradnormPlugin(alpha=0.0, lr=0.2, every=1)
    engine = engine_of(plugin)
    engine.fit([BATCH], until="80 steps")
    weights, norms = weights_of(plugin), trunk_norms(engine.model)
    assert min(weights.values()) > 0
    assert weights["one"] * norms["one"] == pytest.approx(weights["two"] * norms["two"], rel=1e-3)


def test_any_split_of_a_step_gives_the_same_weights() -> None:
    """Fails if norms are per micro-batch instead of per step."""
    whole, split = WeighGradnormPlugin(every=1), WeighGradnormPlugin(every=1)
    engine_of(whole).fit([BATCH], until="2 steps")
    engine_of(split, accumulate=3).fit([BATCH[:1], BATCH[1:3], BATCH[3:]], until="2 steps")
    assert weights_of(split) == pytest.approx(weights_of(whole), rel=1e-6)


def test_updates_come_every_so_many_steps() -> None:
    """Fails if the expensive part runs in every step."""
    plugin = WeighGradnormPlugin(every=4, lr=1.0)
    engine, seen = engine_of(plugin), []
    for _ in engine.steps([BATCH], until="9 steps"):
        seen.append(engine.metrics["weight/two"])
    assert len(set(seen[:1])) == 1
    assert seen[1] == seen[4]
    assert seen[0] != seen[1]


def test_shared_parameters_can_be_named() -> None:
    """Fails if a pattern is ignored, or a misspelt one accepted."""
    plugin = WeighGradnormPlugin(alpha=0.0, lr=1.0, every=1, shared=["trunk.bias"])
    engine = engine_of(plugin)
    engine.fit([BATCH], until="1 step")
    weights = weights_of(plugin)
    norms = {}
    for name, factor in FACTORS.items():
        engine.model.zero_grad()
        (factor * engine.model(BATCH)[name].square().mean()).backward()
        norms[name] = float(engine.model.trunk.bias.grad.norm())
    assert weights["one"] * norms["one"] == pytest.approx(weights["two"] * norms["two"], rel=1e-4)
    with pytest.raises(ConfigError, match=r"weigh_gradnorm\.shared: the pattern 'trunks\.\*'"):
        engine_of(WeighGradnormPlugin(shared=["trunks.*"])).fit([BATCH], until="1 step")


def test_terms_that_share_nothing_are_refused() -> None:
    """Fails if terms without shared parameters are accepted."""
    engine = engine_of(WeighGradnormPlugin(shared=["heads.*"], every=1))
    with pytest.raises(ConfigError, match="no parameter is reached by two loss terms"):
        engine.fit([BATCH], until="1 step")


class SidePlugin(HeadPlugin):
    """A term with its own parameter."""

    parameter: nn.Parameter

    def loss(self, batch: Tensor, output: dict[str, Tensor]) -> Tensor:
        return len(batch) * self.parameter.square().sum()


def test_a_term_beside_the_trunk_keeps_its_own_weight() -> None:
    """Fails if a term with only its own parameters stops the run, or is balanced."""
    plugin, side = WeighGradnormPlugin(every=1), SidePlugin("side", 1.0, weight=0.5)
    model = Shared().double()
    model.register_parameter("side", nn.Parameter(torch.ones(2).double()))
    side.parameter = model.side
    terms = [HeadPlugin("one", 1.0), HeadPlugin("two", 1000.0), side]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = Engine(model, optimizer, plugins=[plugin, *terms], log_every=1)
    engine.fit([BATCH], until="3 steps")
    assert weights_of(plugin).keys() == {"one", "two"}
    assert engine.metrics["weight/side"] == 0.5


class HingePlugin(HeadPlugin):
    """A term with zero gradient, or that is not finite."""

    level: float = 0.0

    def loss(self, batch: Tensor, output: dict[str, Tensor]) -> Tensor:
        return self.level * output["one"].square().sum()


@pytest.mark.filterwarnings("ignore:skipped the update of step")
@pytest.mark.parametrize("level", [0.0, float("nan")])
def test_a_term_without_a_usable_gradient_does_not_stop_the_balancing(level: float) -> None:
    """Fails if one zero gradient, or one overflow, freezes the weights of all terms."""
    plugin, hinge = WeighGradnormPlugin(alpha=0.0, lr=0.5, every=1), HingePlugin("hinge", 1.0)
    hinge.level = level
    model = Shared().double()
    terms = [HeadPlugin("one", 1.0), HeadPlugin("two", 1000.0), hinge]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = GuardPlugin(max_consecutive=99, records=0)
    engine = Engine(model, optimizer, plugins=[plugin, guard, *terms], log_every=1)
    engine.fit([BATCH], until="60 steps")
    weights, norms = weights_of(plugin), trunk_norms(model)
    assert weights["one"] * norms["one"] == pytest.approx(weights["two"] * norms["two"], rel=1e-3)
    assert weights["hinge"] == pytest.approx(1.0)
    assert sum(weights.values()) == pytest.approx(3.0)


def test_a_gradient_that_goes_does_not_move_the_sum_of_the_weights() -> None:
    """Fails if a term with occasional gradients makes the total gradient norm fluctuate."""
    plugin, hinge = WeighGradnormPlugin(alpha=0.0, lr=0.5, every=1), HingePlugin("hinge", 1.0)
    model = Shared().double()
    terms = [HeadPlugin("one", 1.0), HeadPlugin("two", 1000.0), hinge]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, seen = Engine(model, optimizer, plugins=[plugin, *terms]), []
    for state in engine.steps([BATCH], until="9 steps"):
        hinge.level = 5.0 if state.step < 6 else 0.0
        seen.append(weights_of(plugin))
    assert [sum(weights.values()) for weights in seen] == pytest.approx([3.0] * 9)
    assert seen[-1]["hinge"] == pytest.approx(seen[5]["hinge"])
    assert seen[-1]["hinge"] != pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_term_with_no_weight_above_zero_is_not_balanced(weight: float) -> None:
    """Fails if a disabled or negatively weighted term freezes the weights of the others."""
    plugin, third = (
        WeighGradnormPlugin(alpha=0.0, lr=0.5, every=1),
        HingePlugin("third", 1.0, weight),
    )
    third.level = 5.0
    model = Shared().double()
    terms = [HeadPlugin("one", 1.0), HeadPlugin("two", 1000.0), third]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = Engine(model, optimizer, plugins=[plugin, *terms], log_every=1)
    engine.fit([BATCH], until="60 steps")
    weights, norms = weights_of(plugin), trunk_norms(model)
    assert weights["one"] * norms["one"] == pytest.approx(weights["two"] * norms["two"], rel=1e-3)
    assert weights.keys() == {"one", "two"}
    assert engine.metrics["weight/third"] == weight


def test_no_step_waits_for_the_device() -> None:
    """Fails if a weight update syncs."""
    engine, reads = engine_of(WeighGradnormPlugin(every=1)), Reads()
    engine.log_every = Interval.parse("99 steps")
    with reads:
        for state in engine.steps([BATCH], until="99 steps"):
            if state.step == 4:
                break
    assert reads.count == 0
