"""The causal module's loss compared with scipy, the acyclicity constraint, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_plugins.loss_causal import LossCausalPlugin, dag_constraint, dag_log_det
from nexus_plugins.model_nexus.nexus import NEXUSOutput


def output(**reports):
    return NEXUSOutput(torch.empty(0), torch.empty(0), reports)


@st.composite
def graphs(draw, acyclic: bool):
    """A weighted graph on 2 to 10 nodes in random order: acyclic, or certainly cyclic."""
    n = draw(st.integers(2, 10))
    numbers = np.random.default_rng(draw(st.integers(0, 99_999)))
    density = draw(st.sampled_from([0.1, 0.4, 1.0]))
    weights = numbers.normal(size=(n, n)) + np.sign(numbers.normal(size=(n, n))) * 0.1
    graph = np.triu(weights * (numbers.random((n, n)) < density), 1)
    if not acyclic:
        length = draw(st.integers(2, n))
        ring = numbers.permutation(n)[:length]
        graph[ring, np.roll(ring, -1)] = 1.0
    order = numbers.permutation(n)
    return graph[np.ix_(order, order)]


@settings(max_examples=60, deadline=None)
@given(graphs(acyclic=True))
def test_constraint_is_zero_without_a_cycle(graph):
    """Fails if an acyclic graph is penalized."""
    assert abs(dag_constraint(torch.from_numpy(graph)).item()) < 1e-8


@settings(max_examples=60, deadline=None)
@given(graphs(acyclic=False))
def test_constraint_is_positive_with_a_cycle(graph):
    """Fails if some cycle has no penalty, even one through all ten nodes."""
    assert dag_constraint(torch.from_numpy(graph)).item() > 1e-7


@settings(max_examples=60, deadline=None)
@given(graphs(acyclic=False), st.booleans())
def test_constraint_and_gradient_match_scipy(graph, transpose):
    """Fails if value or gradient differ from NOTEARS."""
    assume(np.abs(graph).max() < 4)
    graph = graph.T.copy() if transpose else graph
    exponential = scipy.linalg.expm(graph * graph)
    adjacency = torch.from_numpy(graph).requires_grad_()
    value = dag_constraint(adjacency)
    value.backward()
    np.testing.assert_allclose(value.item(), np.trace(exponential) - len(graph), rtol=1e-8)
    np.testing.assert_allclose(adjacency.grad.numpy(), 2 * graph * exponential.T, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), reconstruction=st.sampled_from([0.0, 0.5]))
def test_loss_matches_numpy(seed, reconstruction):
    """Fails if the formula differs from the documented one."""
    numbers = np.random.default_rng(seed)
    adjacency, variables = numbers.normal(size=(4, 4)), numbers.normal(size=(2, 3, 4))
    expected = 1.5 * (np.trace(scipy.linalg.expm(adjacency**2)) - 4)
    expected += 0.02 * np.abs(adjacency).sum()
    missed = [variable - adjacency.T @ variable for variable in variables.reshape(-1, 4)]
    expected += reconstruction * np.mean([(miss**2).sum() / 2 for miss in missed])
    plugin = LossCausalPlugin(
        classic=True, dag_weight=1.5, sparsity_weight=0.02, reconstruction_weight=reconstruction
    )
    report = {"adjacency": torch.from_numpy(adjacency), "variables": torch.from_numpy(variables)}
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    mean = plugin.loss(batch, output(causal=report)).item() / float(plugin.units(batch))
    np.testing.assert_allclose(mean, expected)


class Graph(nn.Module):
    """A learned adjacency, whatever the input."""

    active_modules: tuple[str, ...] = ("causal",)

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.Parameter(torch.tensor([[0.0, 0.7], [0.5, 0.0]]))

    def forward(self, input_ids):
        return output(causal={"adjacency": self.edges})


def test_the_term_counts_once_a_step_however_it_is_split():
    """Fails if accumulation multiplies the graph penalty."""
    trained = []
    for accumulate in (1, 4):
        model = Graph()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plugin = LossCausalPlugin(weight=1.0, classic=True)
        engine = Engine(model, optimizer, plugins=[plugin], accumulate=accumulate)
        batches = [{"input_ids": torch.zeros(1, 2)}] * accumulate
        before = dag_constraint(model.edges).item()
        engine.fit(batches, until="1 steps")
        assert engine.metrics["causal/dag_constraint"] == pytest.approx(before)
        trained.append(model.edges.detach())
    torch.testing.assert_close(*trained)
    assert dag_constraint(trained[0]).item() < before


class Reader(Graph):
    """A learned adjacency, and two variables of each token."""

    def forward(self, input_ids):
        variables = torch.stack([input_ids.sin(), input_ids.cos()], -1)
        return output(causal={"adjacency": self.edges, "variables": variables})


def edges_after_a_step(*batches):
    model = Reader()
    plugin = LossCausalPlugin(weight=1.0, classic=True, reconstruction_weight=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, plugins=[plugin], accumulate=len(batches))
    engine.fit(list(batches), until="1 steps")
    return model.edges.detach(), engine.evaluate(batches)["val/causal_loss"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 9999), lengths=st.lists(st.integers(1, 6), min_size=3, max_size=3))
def test_reconstruction_knows_no_padding_and_no_split_of_a_step(seed, lengths):
    """Fails if padding counts, or the split into micro-batches matters."""
    numbers = np.random.default_rng(seed)
    ids = torch.from_numpy(numbers.integers(0, 50, (3, 7)))
    labels = torch.full((3, 7), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = ids[row, 1 : length + 1]  # `length + 1` tokens, then padding
    other = ids.where(torch.arange(7) <= torch.tensor(lengths)[:, None], 99)
    whole, loss = edges_after_a_step({"input_ids": ids, "labels": labels})
    rows = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(3)]
    for again, same in (
        edges_after_a_step({"input_ids": other, "labels": labels}),
        edges_after_a_step(*rows),
        edges_after_a_step({k: torch.cat([rows[0][k], rows[1][k]]) for k in rows[0]}, rows[2]),
    ):
        torch.testing.assert_close(again, whole)
        assert same == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("active", [(), ("causal",)])
def test_a_model_without_the_module_is_refused(active):
    """Fails if the user gets a KeyError, or nothing, instead of the setting to enable."""
    model = Graph()
    model.active_modules = active
    model.forward = lambda input_ids: output(world=model.edges)
    engine = Engine(model, torch.optim.SGD(model.parameters()), plugins=[LossCausalPlugin()])
    with pytest.raises(ConfigError, match=r"ModelNexusPlugin\(causal=True\).*LossCausalPlugin"):
        engine.fit([{"input_ids": torch.zeros(1, 3)}], until="1 steps")


def test_defaults_are_those_of_the_full_model():
    """Fails if a default of the documented table has changed."""
    config = LossCausalPlugin(classic=True).config
    assert (config.weight, config.dag_weight, config.sparsity_weight) == (0.05, 1.0, 0.01)
    assert (config.reconstruction_weight, config.dag_growth, config.constraint) == (0, 1, "exp")
    assert LossCausalPlugin().config.reconstruction_weight == 1
    assert LossCausalPlugin(classic=True, sparsity_weight=0.3).config.sparsity_weight == 0.3


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_log_determinant_is_zero_without_a_cycle_only_and_matches_numpy(data):
    """Fails if DAGMA's constraint misses cycles, or fails far from acyclic graphs."""
    graph = data.draw(graphs(acyclic=True))
    assert abs(dag_log_det(torch.from_numpy(graph)).item()) < 1e-8
    graph = data.draw(graphs(acyclic=False))
    adjacency = torch.from_numpy(graph).requires_grad_()
    value = dag_log_det(adjacency)
    value.backward()
    squares, n = graph * graph, len(graph)
    scale = max(1.0, 1.1 * min(squares.sum(0).max(), squares.sum(1).max()))
    inner = scale * np.eye(n) - squares
    assert value.item() > 1e-12
    np.testing.assert_allclose(
        value.item(), n * np.log(scale) - np.log(np.linalg.det(inner)), rtol=1e-6, atol=1e-9
    )
    expected = 2 * graph * np.linalg.inv(inner).T
    np.testing.assert_allclose(adjacency.grad.numpy(), expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), observed=st.booleans(), intervened=st.booleans())
def test_likelihood_matches_scipy_and_leaves_out_what_was_set_by_hand(seed, observed, intervened):
    """Fails if intervened values count, or the formula is wrong."""
    numbers = np.random.default_rng(seed)
    variables, explained, read = numbers.normal(size=(3, 2, 3, 4))
    log_std, adjacency = numbers.normal(size=4), np.triu(numbers.normal(size=(4, 4)), 1)
    do = numbers.random(size=(2, 3, 4)) < 0.4
    each = -scipy.stats.norm.logpdf(variables, explained, np.exp(log_std)) - np.log(2 * np.pi) / 2
    each = np.where(do & intervened, 0, each)
    expected = each.sum((0, 1, 2)) + 6 * 0.02 * np.abs(adjacency).sum()
    if observed:
        expected += ((variables - read) ** 2).sum() / 2
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    batch |= {"variables": torch.from_numpy(variables)} if observed else {}
    batch |= {"do": torch.from_numpy(do)} if intervened else {}
    reports = {"adjacency": adjacency, "variables": variables, "explained": explained}
    reports |= {"log_std": log_std, "read": read}
    plugin = LossCausalPlugin(sparsity_weight=0.02)
    given_ = {name: torch.from_numpy(value) for name, value in reports.items()}
    np.testing.assert_allclose(plugin.loss(batch, output(causal=given_)).item(), expected)
