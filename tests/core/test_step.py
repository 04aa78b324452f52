"""The loss algebra: a step's gradient must not depend on how its samples are split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from nexus_core import (
    Engine,
    Loss,
    LossConfig,
    Plugin,
    PluginConfig,
    PluginError,
    Step,
    hookimpl,
)  # fmt: skip
from nexus_core.data import Micro
from nexus_core.events import Run
from nexus_core.update import accumulate_gradient, prepare, take_step
from tiny import AbsolutePlugin, Net, Regression, SquaredPlugin, weights


def gradients(split: list[list[int]], *plugins: Loss) -> tuple[list[torch.Tensor], dict]:
    """One step over the given micro-batches in double precision: gradients and logged means."""
    torch.manual_seed(1)
    model = Net(dtype=torch.float64)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), plugins=plugins)
    data = Regression(dtype=torch.float64)
    micro = [Micro(default_collate([data[i] for i in rows])) for rows in split]
    take_step(engine, prepare(engine, micro))
    return [p.grad for p in model.parameters()], engine.meter.read(engine.ranks)


splits = st.integers(1, 23).flatmap(
    lambda n: st.permutations(range(n)).flatmap(
        lambda rows: st.lists(st.integers(1, max(1, n - 1)), max_size=6).map(
            lambda cuts: [
                list(rows)[a:b]
                for a, b in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), n], strict=True)
                if a < b
            ]
        )
    )
)


@given(splits)
def test_gradient_is_the_same_for_every_split_of_ragged_labels(split: list[list[int]]) -> None:
    """Rows have 1 to 3 labels: means of means would weight them wrongly."""

    def plugins() -> list[Loss]:
        return [SquaredPlugin(weight=0.7), AbsolutePlugin(weight=2.0)]

    whole, metrics = gradients([sum(split, [])], *plugins())
    parts, split_metrics = gradients(split, *plugins())
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    assert split_metrics == pytest.approx(metrics, rel=1e-5)


def test_gradient_is_that_of_the_mean_by_hand() -> None:
    """The oracle is plain autograd over all labels of the step at once."""
    found, metrics = gradients([[0, 1], [2]], SquaredPlugin(weight=3.0))
    torch.manual_seed(1)
    model, data = Net(dtype=torch.float64), Regression(dtype=torch.float64)
    counted = data.y[:3].isfinite()
    loss = 3.0 * torch.mean((model(data.x[:3])[counted] - data.y[:3][counted]) ** 2)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    assert metrics["train/squared_loss"] == pytest.approx(loss.item() / 3)
    assert metrics["train/total_loss"] == pytest.approx(loss.item())


def test_step_without_a_label_that_counts_changes_nothing() -> None:
    """Zero units must give a zero gradient, not nan."""
    model = Net()
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), plugins=[SquaredPlugin()])
    before = weights(engine)
    batch = {"x": torch.ones(2, 5), "y": torch.full((2, 4), torch.nan)}
    take_step(engine, prepare(engine, [Micro(batch)]))
    assert all(map(torch.equal, before, weights(engine)))


class OtherPlugin(SquaredPlugin):
    """A second plugin with the same term."""

    term = "squared"


class UnlabelledPlugin(Loss[LossConfig]):
    """Returns another term name from `loss_terms` than from `loss_units`."""

    def units(self, batch: object) -> float:
        return 1.0

    @hookimpl
    def loss_terms(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"stranger": output.sum()}


def test_terms_must_be_unique_and_have_units() -> None:
    with pytest.raises(PluginError, match="two plugins return the loss term 'squared'"):
        gradients([[0]], SquaredPlugin(), OtherPlugin())
    with pytest.raises(PluginError, match="no units"):
        gradients([[0]], UnlabelledPlugin())


class DoublesPlugin(Plugin[PluginConfig]):
    """From the second step on, computes the gradient itself: twice the core's."""

    @hookimpl
    def accumulate_gradient(self, engine: Run, step: Step) -> bool | None:
        if step.number == 1:
            return None
        accumulate_gradient(engine, step)
        for parameter in engine.parameters():
            parameter.grad *= 2
        return True


def test_a_plugin_can_compute_the_gradient_in_place_of_the_core() -> None:
    """Fails if the core does not call it, or computes the gradient as well."""
    found: list[list[torch.Tensor]] = []
    for plugins in ([], [DoublesPlugin()]):
        torch.manual_seed(1)
        model = Net(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        engine = Engine(model, optimizer, plugins=[SquaredPlugin(), *plugins], accumulate=2)
        data = [default_collate([Regression(dtype=torch.float64)[i]]) for i in range(4)]
        for _ in engine.steps(data, until="2 steps"):
            found.append([p.grad.clone() for p in model.parameters()])
    first, second, same, doubled = found
    assert all(map(torch.equal, first, same))
    assert all(torch.equal(2 * one, other) for one, other in zip(second, doubled, strict=True))
