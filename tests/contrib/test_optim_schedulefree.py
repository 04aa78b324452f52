"""Schedule-Free AdamW: trains one set of weights, evaluates another, resumes bitwise."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_core import ConfigError, Engine, Plugin
from nexus_core.errors import PluginError
from nexus_core.plan import load
from nexus_plugins.guard import GuardPlugin
from nexus_plugins_contrib.optim_schedulefree import OptimSchedulefreePlugin
from tiny import Net, Regression, SquaredPlugin

schedulefree = pytest.importorskip("schedulefree")

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}


def data() -> list[dict[str, Tensor]]:
    rows = Regression(20)
    return [{"x": rows.x[i : i + 5], "y": rows.y[i : i + 5]} for i in range(0, 20, 5)]


def engine_of(*plugins: Plugin[Any], dropout: float = 0.2, **options: Any) -> Engine:
    torch.manual_seed(3)
    optimizer = OptimSchedulefreePlugin(**SETTINGS)
    return Engine(Net(dropout), plugins=[SquaredPlugin(), optimizer, *plugins], seed=5, **options)


def by_hand(steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights `y` and `x` after some steps, from the paper's equations."""
    torch.manual_seed(3)
    model = Net()
    decays = [p.ndim > 1 for p in model.parameters()]
    (beta, second), lr = SETTINGS["betas"], SETTINGS["lr"]
    x = [p.detach().double().clone() for p in model.parameters()]
    z, mean = [w.clone() for w in x], [torch.zeros_like(w) for w in x]
    for step in range(steps):
        y = [(1 - beta) * a + beta * b for a, b in zip(z, x, strict=True)]
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), y, strict=True):
                parameter.copy_(value)
        model.zero_grad()
        batch = data()[step % 4]
        counts = batch["y"].isfinite()
        (model(batch["x"]) - batch["y"])[counts].square().sum().div(counts.sum()).backward()
        for i, parameter in enumerate(model.parameters()):
            gradient = parameter.grad.double()
            mean[i] = second * mean[i] + (1 - second) * gradient**2
            size = (mean[i] / (1 - second ** (step + 1))).sqrt() + 1e-8
            decay = SETTINGS["weight_decay"] * y[i] if decays[i] else 0.0
            z[i] = z[i] - lr * (gradient / size + decay)
            x[i] = x[i] + (z[i] - x[i]) / (step + 1)
    return [(1 - beta) * a + beta * b for a, b in zip(z, x, strict=True)], x


def weights(engine: Engine) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


def test_the_update_is_that_of_the_paper() -> None:
    """Fails if the optimizer is in the wrong mode, or decay and groups are mixed up."""
    engine = engine_of(dropout=0.0)
    steps = engine.steps(data(), until=7)
    for _ in range(6):
        next(steps)
    trained, shown = by_hand(6)
    for got, expected in zip(weights(engine), trained, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    model = list(engine.state_dict()["model"].values())
    for got, expected in zip(model, shown, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_evaluation_sees_the_average_and_training_does_not_notice() -> None:
    """Fails if switching to the average and back rounds, so that evaluating changes the run."""
    quiet, watched = engine_of(), engine_of()
    seen: list[list[Tensor]] = []

    def note(module: torch.nn.Module, _: object) -> None:
        if not module.training:
            seen.append([p.detach().clone() for p in module.parameters()])

    watched.model.register_forward_pre_hook(note)
    for engine, every in ((quiet, None), (watched, "1 step")):
        torch.manual_seed(5)
        for state in engine.steps(data(), until=9, eval_data=data()[:1], eval_every=every):
            if state.step == 6:
                break
    for a, b in zip(weights(quiet), weights(watched), strict=True):
        assert torch.equal(a, b)
    average = list(watched.state_dict()["model"].values())
    assert len(seen) == 6
    for a, b, trained in zip(seen[-1], average, weights(watched), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, trained)


@pytest.mark.filterwarnings("ignore:skipped the update of step 5")
def test_a_refused_step_does_not_count() -> None:
    """Fails if a skipped step gets weight in the average."""
    engine = engine_of(GuardPlugin())
    batches = [data()[0]] * 4 + [{**data()[0], "x": data()[0]["x"] * float("nan")}] + data()
    counters = [
        [(group["k"], group["weight_sum"]) for group in engine.optimizer.param_groups]
        for _ in engine.steps(batches, until=6)
    ]
    assert counters[4] == counters[3]
    assert counters[5] != counters[4]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, on_disk: bool) -> None:
    """Fails if the training weights are recomputed from the average, with rounding."""

    def make(name: str) -> Engine:
        more = [load("checkpoint")(every="3 steps", sync=True)] if on_disk else []
        return engine_of(*more, out=tmp_path / name)

    whole = make("whole")
    whole.fit(data(), until=7)
    first = make("parts")
    for state in first.steps(data(), until=7):
        if state.step == 3:
            break
    snapshot = copy.deepcopy(first.state_dict())
    second = make("parts")
    if on_disk:
        second.resume()
    else:
        second.load_state_dict(snapshot)
    assert second.state.step == 3
    second.fit(data(), until=7)
    one, other = whole.state_dict(), second.state_dict()
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    kept = [s["plugins"]["optim_schedulefree"]["state"]["training_weights"] for s in (one, other)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_after_the_run_the_model_is_the_average_and_the_run_can_go_on() -> None:
    """Fails if `fit` leaves the training weights, or continuing starts from the average."""
    whole = engine_of(dropout=0.0)
    whole.fit(data(), until=8)
    parts = engine_of(dropout=0.0)
    parts.fit(data(), until=4)
    shown = weights(parts)
    for a, b in zip(shown, parts.state_dict()["model"].values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(shown, weights(parts), strict=True):
        assert torch.equal(a, b), "reading the state leaves the model as it is"
    parts.fit(data(), until=8)
    for a, b in zip(weights(whole), weights(parts), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["lr_cosine", "lr_linear", "lr_rsqrt", "lr_wsd", "ema"])
def test_what_decays_or_averages_too_is_refused(name: str) -> None:
    """Fails if a decaying schedule is allowed together with the average."""
    with pytest.raises(PluginError, match=f"{name}.*cannot be used together"):
        engine_of(load(name)())


def test_a_warm_up_by_lr_constant_is_that_of_the_package() -> None:
    """Fails if the run's learning rate does not reach the optimizer."""
    by_run = engine_of(load("lr_constant")(warmup="4 steps"), dropout=0.0)
    torch.manual_seed(3)
    own = OptimSchedulefreePlugin(**SETTINGS, warmup_steps=4)
    by_package = Engine(Net(), plugins=[SquaredPlugin(), own], seed=5)
    for engine in (by_run, by_package):
        engine.fit(data(), until=6)
    for a, b in zip(weights(by_run), weights(by_package), strict=True):
        torch.testing.assert_close(a, b)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the user gets an ImportError."""
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match=r"pip install 'nexus-trainer\[schedulefree\]'"):
        engine_of()
