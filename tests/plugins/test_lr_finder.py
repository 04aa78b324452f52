"""The range test: its rates, where it stops, what it suggests, and what it restores."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import ConfigError, Engine
from nexus_core.batches import Batch
from nexus_core.cli import chart
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.lr_finder import LrFinderPlugin, Sweep
from tiny import Regression, tiny_engine


class Bowl(nn.Module):
    """Ten weights whose loss is half their squared length: SGD diverges above a rate of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.ones(10))

    def forward(self, _: Tensor) -> Tensor:
        return 0.5 * self.at.square().sum()


def bowl_engine(*plugins: Any, **options: Any) -> Engine:
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.1)
    return Engine(model, optimizer, loss=lambda m, b: m(b), plugins=plugins, seed=1, **options)


DATA = [torch.zeros(1)] * 4


def test_rates_grow_geometrically_and_the_groups_keep_their_ratio() -> None:
    """Fails if the first or last rate is wrong, or the steps between are uneven."""
    weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    model = nn.ParameterList(weights)
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    finder = LrFinderPlugin(start=1e-5, end=1e-1, steps=9)
    engine = Engine(model, optimizer, loss=lambda m, b: m[0].sum() + m[1].sum(), plugins=[finder])
    seen = [[g["lr"] for g in optimizer.param_groups] for _ in engine.steps(DATA, until=20)][:-1]
    assert [rates[0] for rates in seen] == pytest.approx(np.geomspace(1e-5, 1e-1, 9)[:-1])
    assert [rates[1] / rates[0] for rates in seen] == pytest.approx([0.1] * 8)
    assert engine.result().reason.startswith("lr_finder: the test is done")
    assert engine.state.step == 9


def test_a_rate_that_diverges_ends_the_run_and_the_suggestions_are_below_it() -> None:
    """Fails if the run never ends, or an unusable rate is suggested."""
    finder = LrFinderPlugin(start=1e-3, end=1e3, steps=200)
    engine = bowl_engine(finder)
    result = engine.fit(DATA, until=500)
    sweep = finder.sweep()
    assert result.status == "stopped"
    assert "diverged" in result.reason
    assert sweep.rates[-1] < 100
    assert all(map(math.isfinite, sweep.losses))
    assert sweep.steepest is not None
    assert 0.01 < sweep.steepest < 2
    assert sweep.tenth_of_minimum is not None
    assert sweep.tenth_of_minimum < 2


@pytest.mark.parametrize("fails", [False, True])
def test_weights_and_optimizer_are_given_back(fails: bool) -> None:
    """Fails if a finished or failed test leaves the diverged weights."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if fails and engine.state.step == 8:
            raise RuntimeError("planted")
        return model(batch)

    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    warm = Engine(model, optimizer, loss=lambda m, b: m(b), seed=1)
    warm.fit(DATA, until=3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    engine = Engine(model, optimizer, loss=loss, plugins=[LrFinderPlugin(steps=30, end=1e6)])
    if fails:
        with pytest.raises(RuntimeError, match="planted"):
            engine.fit(DATA, until=100)
    else:
        engine.fit(DATA, until=100)
    assert torch.equal(model.at, weights["at"])
    assert optimizer.param_groups[0]["lr"] == state["param_groups"][0]["lr"]
    momenta = [
        s["momentum_buffer"] for s in (optimizer.state_dict()["state"][0], state["state"][0])
    ]
    assert torch.equal(*momenta)


def test_a_resumed_test_has_the_same_curve(tmp_path: Path) -> None:
    """Fails if a killed test restarts, or restores the wrong weights."""

    def finder_and_engine(name: str) -> tuple[LrFinderPlugin, Engine]:
        finder = LrFinderPlugin(steps=12, end=0.1)
        checkpoint = CheckpointPlugin(every="5 steps", sync=True)
        return finder, tiny_engine(finder, checkpoint, dropout=0.3, out=tmp_path / name)

    def data() -> list[dict[str, Tensor]]:
        rows = Regression(24)
        return [{"x": rows.x[i : i + 4], "y": rows.y[i : i + 4]} for i in range(0, 24, 4)]

    whole, engine = finder_and_engine("whole")
    start = copy.deepcopy(engine.model.state_dict())
    engine.fit(data(), until=12)
    _, first = finder_and_engine("parts")
    for state in first.steps(data(), until=12):
        if state.step == 5:
            break
    second, resumed = finder_and_engine("parts")
    resumed.resume()
    resumed.fit(data(), until=12)
    assert second.sweep() == whole.sweep()
    assert len(second.sweep().losses) == 12
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, start[name]), name


def test_the_same_engine_can_test_again() -> None:
    """Fails if a second test starts at the end of the first."""
    finder = LrFinderPlugin(steps=10, end=0.1)
    engine = bowl_engine(finder)
    engine.fit(DATA, until=50)
    first = finder.sweep()
    engine.fit(DATA, until=50)
    assert finder.sweep() == first
    assert engine.state.step == 20


def test_micro_batches_count_as_one_step() -> None:
    """Fails if the loss of a step is that of its last micro-batch."""
    finder = LrFinderPlugin(steps=8, end=1e-5)
    engine = tiny_engine(finder, accumulate=2, log_every=1)
    rows = Regression(8)
    batches = [{"x": rows.x[i : i + 4], "y": rows.y[i : i + 4]} for i in (0, 4)]
    with torch.no_grad():
        counts = rows.y.isfinite()
        expected = (engine.model(rows.x) - rows.y)[counts].square().mean().item()
    engine.fit(batches, until=8)
    assert finder.sweep().losses[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_the_run_folder_has_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_matplotlib: bool
) -> None:
    """Fails if the file is not the curve, or the plugin needs matplotlib to work."""
    if with_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(chart, "find_spec", lambda _: None)
    finder = LrFinderPlugin(start=1e-3, end=1e2, steps=60)
    engine = bowl_engine(finder, out=tmp_path)
    engine.fit(DATA, until=60)
    with (tmp_path / "lr_finder.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == list(finder.sweep().losses)
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert (tmp_path / "lr_finder.png").exists() is with_matplotlib
    said = {
        name: text for row in engine.hook.summarize(engine=engine) for name, text in row.items()
    }
    assert said["learning rate"].startswith(f"{finder.sweep().steepest:.1e}")
    assert "⠀" in said["curve"]
    assert ("lr_finder.png" in said["written"]) is with_matplotlib


@given(bottom=st.floats(-4, -1.5), depth=st.floats(0.5, 8), smoothing=st.floats(0, 0.85))
def test_smoothing_does_not_shift_the_minimum(
    bottom: float, depth: float, smoothing: float
) -> None:
    """Fails if the running mean lags behind: a symmetric valley keeps its place."""
    rates = np.geomspace(1e-6, 1, 121)
    losses = 10 - depth * np.exp(-((np.log10(rates) - bottom) ** 2))
    sweep = Sweep.of(rates.tolist(), losses.tolist(), smoothing)
    assert sweep.tenth_of_minimum is not None
    assert abs(math.log10(sweep.tenth_of_minimum) - (bottom - 1)) < 0.3
    assert sweep.steepest is not None
    assert sweep.steepest < 10**bottom


def test_nothing_is_suggested_where_the_loss_never_falls() -> None:
    """Fails if noise or a rising loss leads to a suggestion."""
    rates = np.geomspace(1e-3, 1, 20).tolist()
    assert Sweep.of(rates, np.linspace(1, 3, 20).tolist(), 0.5).steepest is None
    assert Sweep.of(rates[:3], [3.0, 2.0, 1.0], 0.5).tenth_of_minimum is None


@pytest.mark.parametrize(
    ("settings", "until", "words"),
    [
        ({"steps": 100}, 50, r"lr_finder.steps is 100.*until='100 steps'.*LrFinderPlugin.steps=50"),
        ({"start": 1.0, "end": 0.1}, 200, r"lr_finder: .*end must be above start"),
        ({"steps": 2}, 200, r"lr_finder.steps: got 2"),
    ],
)
def test_a_test_that_cannot_be_is_refused(settings: dict[str, Any], until: int, words: str) -> None:
    """Fails if the test silently ends before its last rate."""
    with pytest.raises(ConfigError, match=words):
        bowl_engine(LrFinderPlugin(**settings)).fit(DATA, until=until)
