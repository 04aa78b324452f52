"""The causal module: its graph, its structural step, and whether a known graph is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ResumableLoader
from nexus_core.engine import Engine
from nexus_plugins.loss_causal import LossCausalPlugin
from nexus_plugins.model_nexus.causal import CausalGraph, CausalModule
from nexus_plugins.model_nexus.classic_causal import ClassicCausal
from nexus_plugins.model_nexus.nexus import NEXUSOutput


def test_nothing_acts_on_itself_before_and_after_training():
    """Fails if a variable explains itself, so that the graph is meaningless."""
    module = ClassicCausal(6, n_variables=5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(3):
        assert module.adjacency.shape == (5, 5)
        assert module.adjacency.diagonal().abs().max() == 0
        assert module.adjacency.abs().sum() > 0
        module(torch.randn(2, 6))[0].square().sum().backward()
        optimizer.step()


def test_update_is_one_structural_step():
    """Fails if the update does not follow the graph."""
    module = ClassicCausal(6, n_variables=5).eval()
    h = torch.randn(2, 3, 6)
    update, reports = module(h)
    variables = reports["causal"]["variables"]
    effects = torch.zeros(2, 3, 5)
    for cause in range(5):
        for effect in range(5):
            effects[..., effect] += variables[..., cause] * module.adjacency[cause, effect]
    expected = (effects @ module.write.projection.weight.T) * module.write.gate
    torch.testing.assert_close(update, expected)


def test_noise_is_drawn_in_training_only_and_from_the_seed():
    """Fails if evaluation is random, or two runs with the same seed differ."""
    module = ClassicCausal(6)
    h = torch.randn(2, 3, 6)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        update: Tensor = module(h)[0]
        return update

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    module.eval()
    assert torch.equal(drawn(1), drawn(2))
    parts = [module.step(token, ())[0] for token in h.unbind(1)]
    torch.testing.assert_close(torch.stack(parts, 1), module(h)[0])


class CausalAlone(nn.Module):
    """A causal module that observes its variables directly."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.causal = ClassicCausal(n, n_variables=n)
        with torch.no_grad():
            self.causal.read.weight.copy_(torch.eye(n))
            self.causal.read.bias.zero_()
        self.causal.read.requires_grad_(False)

    def forward(self, states: Tensor) -> NEXUSOutput:
        update, reports = self.causal(states)
        return NEXUSOutput(update, torch.empty(0), reports)


def structural_data(n: int, samples: int) -> tuple[Tensor, Tensor]:
    """A random graph on n variables, in random order, and samples of its linear model."""
    order = torch.randperm(n)
    edges = (torch.rand(n, n) < 0.3).triu(1)
    strengths = (0.5 + 1.5 * torch.rand(n, n)) * torch.randn(n, n).sign() * edges
    values = torch.randn(samples, n)
    for effect in range(n):
        values[:, effect] += values @ strengths[:, effect]
    graph = torch.zeros(n, n)
    graph[order[:, None], order] = strengths
    shuffled = torch.zeros(samples, n)
    shuffled[:, order] = values
    return graph, shuffled


def hamming_distance(found: Tensor, true: Tensor) -> int:
    """The number of edges to add, remove or reverse to get from one graph to the other."""
    found, true = found.bool(), true.bool()
    pairs = torch.triu(torch.ones_like(true), 1)
    differs = (found != true) | (found.T != true.T)
    return int((differs & pairs).sum())


@pytest.mark.slow
def test_a_known_graph_of_eight_variables_is_recovered():
    """Fails if the adjacency does not converge to the structure of the variables."""
    for seed in range(3):
        torch.manual_seed(seed)
        true, samples = structural_data(8, 1000)
        assert true.bool().sum() >= 4
        model = CausalAlone(8)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        plugin = LossCausalPlugin(
            classic=True,
            weight=1.0,
            dag_weight=10.0,
            sparsity_weight=0.05,
            reconstruction_weight=1.0,
        )
        optimizer = torch.optim.Adam(trained, lr=0.02)
        batch = {"states": samples[None], "input_ids": torch.zeros(1, len(samples))}
        Engine(model, optimizer, plugins=[plugin]).fit([batch] * 500, until="500 steps")
        found = model.causal.adjacency.detach()
        assert hamming_distance(found.abs() > 0.3, true) <= 2


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_variable_depends_on_what_has_an_edge_to_it_and_on_nothing_else(hidden):
    """Fails if the reported graph is not the one used to explain."""
    torch.manual_seed(0)
    graph = CausalGraph(["rain", "sprinkler", "wet"], hidden)
    weights = graph.first if hidden else graph.edges
    with torch.no_grad():
        weights[0, 2] = 0
    variables = torch.randn(7, 3)
    slopes = torch.autograd.functional.jacobian(lambda v: graph.explained(v).sum(0), variables)
    depends = (slopes.abs() > 1e-9).any(1).T  # from cause to effect
    assert torch.equal(depends, graph.adjacency.detach().abs() > 1e-5)
    assert not depends.diagonal().any()
    assert graph.names == ("rain", "sprinkler", "wet")
    module = CausalModule(6, graph.names, hidden)
    states = torch.randn(2, 3, 6, requires_grad=True)
    update, reports = module(states)
    assert update.shape == (2, 3, 6)
    (update.sum() + reports["causal"]["read"].sum()).backward()
    assert states.grad is None  # a probe sends no gradient to its input
    assert not reports["causal"]["variables"].requires_grad
    assert reports["causal"]["read"].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 8])
def test_interventions_reveal_a_graph_that_variance_does_not_give_away(hidden):
    """Fails if `do` is not used: without it, standardized data reveals half as much."""
    generator = torch.Generator().manual_seed(hidden)
    order = torch.randperm(6, generator=generator).tolist()
    true = torch.zeros(6, 6, dtype=torch.bool)
    for cause, effect in ((0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (2, 5), (4, 5)):
        true[order[cause], order[effect]] = True

    def sampled(set_by_hand=None):
        values = torch.zeros(400, 6)
        for one in order:
            noise = torch.randn(400, generator=generator)
            causes = values[:, true[:, one]]
            told = (causes + causes.cos() * 2 if hidden else causes).sum(1)
            values[:, one] = noise if set_by_hand == one else told + noise
        return values, torch.arange(6).expand(400, 6) == (
            -1 if set_by_hand is None else set_by_hand
        )

    parts = [sampled(), *(sampled(one) for one in range(6))]
    values, do = (torch.cat(some) for some in zip(*parts, strict=True))
    values = (values - parts[0][0].mean(0)) / parts[0][0].std(0)
    torch.manual_seed(0)
    model = CausalGraph(6, hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    data = ResumableLoader(
        [{"variables": v, "do": d} for v, d in zip(values, do, strict=True)], 256
    )
    Engine(model, optimizer, plugins=[LossCausalPlugin(weight=1.0)]).fit(data, until="600 steps")
    found = model.adjacency.detach().abs() > 0.1
    assert (found & true).sum() >= true.sum() - int(hidden > 0)
    assert hamming_distance(found, true) <= 2
