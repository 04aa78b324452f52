"""An evaluation is a scope: everything is restored on exit, and its metrics arrive."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import Engine, Loss, LossConfig, Plugin, PluginConfig, hookimpl
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.early_stop import EarlyStopPlugin
from nexus_plugins.ema import EmaPlugin

BATCHES = [torch.randn(8, 2, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def new(*plugins: Plugin[Any], loss: Any = square, model: Any = None, **options: Any) -> Engine:
    torch.manual_seed(0)
    net = model or nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    return Engine(net, optimizer, loss=loss, plugins=plugins, **options)


class LowRank(nn.Linear):
    """Merges its low-rank factors into the weight for inference, as adapters do."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.a, self.b = nn.Parameter(torch.full((2, 2), 0.1)), nn.Parameter(torch.ones(1, 2))
        self.merged = False

    def train(self, mode: bool = True) -> LowRank:
        super().train(mode)
        if mode is self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x @ self.a.T @ self.b.T


@given(cuts=st.sets(st.integers(1, 31)))
def test_the_mean_of_an_evaluation_does_not_depend_on_how_its_rows_are_cut(cuts: set[int]) -> None:
    rows = torch.cat(BATCHES)
    engine = new(loss=square)
    batches = [rows[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(rows)])]
    with torch.no_grad():
        whole = square(engine.model.eval(), rows).item()
    assert engine.evaluate(batches)["val/loss"] == pytest.approx(whole, rel=1e-5)


def test_overrides_of_train_and_eval_are_called_as_a_loop_by_hand_calls_them() -> None:
    torch.manual_seed(0)
    twin = LowRank()
    engine = new(model=copy.deepcopy(twin))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    engine.fit(BATCHES, until=8, eval_data=BATCHES[:1], eval_every="4 steps")
    for step in range(8):
        optimizer.zero_grad()
        square(twin, BATCHES[step % 4]).backward()
        optimizer.step()
        if step in (3, 7):
            twin.eval()
            twin.train()
    assert not engine.model.merged
    assert all(map(torch.equal, engine.model.parameters(), twin.parameters()))


def test_every_module_gets_its_own_mode_back() -> None:
    engine = new()
    engine.model[2].eval()
    engine.evaluate(BATCHES)
    assert [module.training for module in engine.model] == [True, True, False, True]
    engine.model.eval()
    engine.evaluate(BATCHES)
    assert not any(module.training for module in engine.model.modules())


def broken() -> Iterator[Tensor]:
    yield BATCHES[0]
    raise OSError("disk gone")


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_failed_evaluation_leaves_the_weights_the_modes_and_the_generators(by_hand: bool) -> None:
    """Fails if the average stays in the model, where it would be trained and saved."""
    engine, ema = new(EmaPlugin(decay=0.9)), None
    ema = engine.plugins["ema"]
    engine.fit(BATCHES, until=5)
    before = copy.deepcopy(engine.model.state_dict())
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run = (engine.evaluate, (broken(),), {})
    if not by_hand:
        run = (engine.fit, (BATCHES,), {"until": 5, "eval_data": broken()})
    call, arguments, options = run
    with pytest.raises(OSError, match="disk gone"):
        call(*arguments, **options)
    assert all(torch.equal(before[n], v) for n, v in engine.model.state_dict().items())
    assert all(torch.equal(before[n], v) for n, v in engine.state_dict()["model"].items())
    assert not torch.equal(before["0.weight"], ema.weights()["0.weight"])
    assert (engine.training, engine.split, engine.model.training) == (True, "train", True)
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert drawn[:2] == now[:2]
    assert torch.equal(drawn[2], now[2])


class CorpusPlugin(Loss[LossConfig]):
    """A metric of the whole set that is not a mean over batches: the largest error."""

    largest = 0.0

    def units(self, batch: Tensor) -> float:
        return float(len(batch))

    def loss(self, batch: Tensor, output: Tensor) -> Tensor:
        return (output - 1).square().sum()

    def validation_loss(self, batch: Tensor, output: Tensor) -> Tensor:
        self.largest = max(self.largest, (output - 1).abs().max().item())
        return self.loss(batch, output)

    @hookimpl
    def measure(self, engine: Engine, split: str) -> dict[str, float]:
        found, self.largest = self.largest, 0.0
        assert not torch.is_grad_enabled()
        assert not engine.model.training
        return {f"{split}/largest": found}


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_measured_reaches_result_early_stop_and_the_best_checkpoint(
    turned: bool, tmp_path: Path
) -> None:
    stop = EarlyStopPlugin(metric="val/largest", mode="min", patience=1, min_delta=1e9)
    best = CheckpointPlugin(every="1 steps", best="val/largest")
    plugins = [CorpusPlugin(), stop, best]
    engine = new(*(plugins[::-1] if turned else plugins), loss=None, out=tmp_path)
    data = {"val": BATCHES[:2], "other": BATCHES[2:]}
    result = engine.fit(BATCHES, until=9, eval_data=data, eval_every="1 steps")
    assert result.status == "stopped"
    assert result.step < 9
    engine.model.eval()
    for name, batches in data.items():
        with torch.no_grad():
            errors = torch.cat([engine.model(batch) - 1 for batch in batches]).abs()
        assert result.metrics[f"{name}/largest"] == pytest.approx(errors.max().item(), rel=1e-5)
    assert list(tmp_path.glob("checkpoints/best*"))


def test_samples_are_of_the_weights_that_are_evaluated() -> None:
    """Wherever the sampler is in the plan: with the average, in evaluation mode."""

    class SamplePlugin(Plugin[PluginConfig]):
        @hookimpl
        def measure(self, engine: Engine) -> None:
            average = engine.plugins["ema"].weights()
            named = engine.model.named_parameters()
            self.seen = all(torch.equal(p, average[n]) for n, p in named), engine.model.training

    for place in (0, 1):
        plugins: list[Any] = [EmaPlugin(decay=0.5)]
        plugins.insert(place, sampler := SamplePlugin())
        new(*plugins).fit(BATCHES, until=3, eval_data=BATCHES)
        assert sampler.seen == (True, False)


def test_an_evaluation_within_one_measures_with_its_weights_and_fires_nothing() -> None:
    events: list[str] = []

    class NestedPlugin(Plugin[PluginConfig]):
        @hookimpl
        def evaluating(self) -> Any:
            @contextmanager
            def scope() -> Iterator[None]:
                events.append("in")
                yield
                events.append("out")

            return scope()

        @hookimpl
        def measure(self, engine: Engine, split: str) -> dict[str, float] | None:
            if split != "val":
                return None
            inner = engine.evaluate({"inner": BATCHES[2:]})
            return {"val/gap": inner["inner/loss"]}

        @hookimpl
        def on_eval(self, metrics: dict[str, float]) -> None:
            events.append("on_eval")

    engine = new(NestedPlugin(), EmaPlugin(decay=0.5))
    engine.fit(BATCHES, until=3)
    metrics = engine.evaluate(BATCHES[:2])
    assert events == ["in", "out", "on_eval"]
    assert metrics["val/gap"] == engine.evaluate({"inner": BATCHES[2:]})["inner/loss"]
    assert metrics["val/loss"] == engine.evaluate(BATCHES[:2])["val/loss"]


def penalty(model: nn.Module, batch: Tensor) -> Tensor:
    x = batch.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def test_a_loss_that_differentiates_is_evaluated_like_any_other() -> None:
    engine = new(loss=penalty)
    engine.fit(BATCHES, until=3)
    gradients = [p.grad for p in engine.model.parameters()]
    found = engine.evaluate(BATCHES)["val/loss"]
    engine.model.eval()
    expected = sum(penalty(engine.model, batch).item() for batch in BATCHES) / len(BATCHES)
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is g for p, g in zip(engine.model.parameters(), gradients, strict=True))


def test_an_error_within_a_loss_that_differentiates_is_the_losss_own() -> None:
    def wrong(model: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        new(loss=wrong).evaluate(BATCHES)


def test_schedule_free_optimizers_are_evaluated_at_their_average() -> None:
    """Passed as an object in any mode; the handwritten loop calls `train` and `eval`."""
    schedulefree = pytest.importorskip("schedulefree")

    def parts() -> Any:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        return model, schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)

    model, optimizer = parts()
    optimizer.train()
    for step in range(12):
        optimizer.zero_grad()
        square(model, BATCHES[step % 4]).backward()
        optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    optimizer.eval()
    with torch.no_grad():
        expected = sum(square(model, batch).item() for batch in BATCHES) / len(BATCHES)
    for mode in ("as made", "train", "eval"):
        own, made = parts()
        getattr(made, mode, lambda: None)()
        engine = Engine(own, made, loss=square)
        result = engine.fit(BATCHES, until=12, eval_data=BATCHES, eval_every="5 steps")
        assert result.metrics["val/loss"] == pytest.approx(expected, rel=1e-5), mode
        assert all(torch.equal(trained[n], v) for n, v in own.state_dict().items()), mode


@pytest.mark.parametrize("until", [2, 4])
def test_a_stop_at_once_gives_up_the_evaluation_and_it_is_made_when_resumed(until: int) -> None:
    """Fails if a signal has to wait for a long evaluation, or the evaluation is lost."""

    class Held:
        """Evaluation batches; the second one triggers the signal."""

        def __init__(self, engine: Engine | None) -> None:
            self.engine = engine

        def __iter__(self) -> Iterator[torch.Tensor]:
            yield torch.ones(2, 1)
            if self.engine is not None:
                self.engine.stop("SIGTERM", at_once=True)
            yield torch.zeros(2, 1)

    def engine() -> Engine:
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Engine(model, optimizer, loss=lambda m, b: (m(b) - 1).square().mean())

    data = [torch.full((2, 1), float(i)) for i in range(4)]
    whole = engine()
    expected = whole.fit(data, until=until, eval_data=Held(None), eval_every="2 steps")
    cut = engine()
    stopped = cut.fit(data, until=until, eval_data=Held(cut), eval_every="2 steps")
    assert (stopped.status, stopped.reason, stopped.step) == ("stopped", "SIGTERM", 2)
    assert "val/loss" not in stopped.metrics
    assert cut.model.training
    resumed = engine()
    resumed.load_state_dict(copy.deepcopy(cut.state_dict()))
    assert cut.state_dict()["due"] == ["evaluate"]
    cut.fit(data, until="3 steps")
    assert cut.state_dict()["due"] == [], "of a step that is long past"
    evaluated: list[int] = []
    for state in resumed.steps(data, until=until, eval_data=Held(None), eval_every="2 steps"):
        evaluated.append(state.evaluated_at)
    assert evaluated == [2, 2, 4][: until - 1]
    assert resumed.result().metrics == expected.metrics
    assert resumed.result().status == "finished"
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_a_loader_of_whole_batches_is_evaluated_and_predicted() -> None:
    """Fails if a DataLoader of whole batches, which has no batch size, ends a run."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, loss=lambda m, b: (m(b) - 1).square().mean())
    data = [torch.full((2, 1), float(i)) for i in range(3)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    assert engine.evaluate(loader) == engine.evaluate(data)
    assert all(map(torch.equal, engine.predict(loader), engine.predict(data)))
