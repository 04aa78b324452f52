"""The averaged weights: correct, used for evaluation, and never for training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import CheckpointError, Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.ema import EmaPlugin


class HistoryPlugin(Plugin[PluginConfig]):
    """Records the weights after each step, and those used for evaluation."""

    after = ("ema",)

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Tensor] = []
        self.evaluated: list[Tensor] = []

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        self.steps.append(_weight(engine))

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.steps.append(_weight(engine))

    @hookimpl
    def loss_terms(self, engine: Engine) -> dict[str, Tensor]:
        if not engine.training:
            self.evaluated.append(_weight(engine))
        return {}


def _weight(engine: Engine) -> Tensor:
    return next(engine.model.parameters()).detach().clone()


def engine_of(*plugins: Plugin[Any], dtype: torch.dtype = torch.float32) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Engine(model, optimizer, loss=lambda m, b: m(b).square().mean(), plugins=plugins)


def data(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(("decay", "ramp"), [(0.5, False), (0.9, False), (0.5, True)])
def test_the_average_is_the_weighted_sum_of_all_steps(decay: float, ramp: bool) -> None:
    """Fails if the recursion, its start or its ramp differs from the explicit sum."""
    history, ema = HistoryPlugin(), EmaPlugin(decay=decay, ramp=ramp)
    engine_of(ema, history).fit(data(), until="12 steps")
    keeps = [min(decay, (1 + n) / (10 + n)) if ramp else decay for n in range(1, 13)]
    shares = torch.ones(13, dtype=torch.float64)
    for step, keep in enumerate(keeps, start=1):
        shares[:step] *= keep
        shares[step] = 1 - keep
    expected = torch.einsum("s,sij->ij", shares, torch.stack(history.steps).double())
    torch.testing.assert_close(ema.weights()["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_training_is_that_without_it_and_evaluation_runs_with_the_average() -> None:
    """Fails if the average leaks into training, or evaluation uses the raw weights."""
    history, ema = HistoryPlugin(), EmaPlugin(decay=0.8)
    plain, averaged = engine_of(), engine_of(ema, history)
    plain.fit(data(), until="6 steps")
    for state in averaged.steps(data(), until="6 steps", eval_data=data(), eval_every="2 steps"):
        if state.step == 4:
            assert torch.equal(history.evaluated[-1], ema.weights()["0.weight"])
            assert not torch.equal(history.evaluated[-1], _weight(averaged))
    assert len(history.evaluated) == 9
    for one, other in zip(plain.model.parameters(), averaged.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_snapshot_in_the_middle_of_an_evaluation_holds_the_weights() -> None:
    """Fails if "best" is saved with the average in place of the weights."""
    taken = []

    class EagerPlugin(Plugin[PluginConfig]):
        @hookimpl(tryfirst=True)
        def on_eval(self, engine: Engine) -> None:
            taken.append(copy.deepcopy(engine.state_dict()["model"]))

    history = HistoryPlugin()
    engine = engine_of(EmaPlugin(decay=0.8), history, EagerPlugin())
    engine.fit(data(), until="3 steps", eval_data=data())
    assert torch.equal(taken[0]["0.weight"], history.steps[-1])


def test_an_evaluation_that_fails_leaves_the_weights() -> None:
    """Fails if a failing evaluation leaves the average in the weights."""
    history = HistoryPlugin()
    engine = engine_of(EmaPlugin(decay=0.8), history)
    with pytest.raises(RuntimeError, match="shapes"):
        engine.fit(data(), until="3 steps", eval_data=[data()[0], torch.ones(2, 5)])
    assert torch.equal(_weight(engine), history.steps[-1])


def test_a_resumed_run_has_the_same_average() -> None:
    """Fails if average or ramp restart after a crash."""

    def fresh() -> tuple[Engine, EmaPlugin]:
        ema = EmaPlugin(decay=0.95)
        return engine_of(ema), ema

    (whole, expected), (first, _), (second, got) = fresh(), fresh(), fresh()
    whole.fit(data(), until="9 steps")
    first.fit(data(), until="4 steps")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(data(), until="9 steps")
    for name, value in expected.weights().items():
        assert torch.equal(value, got.weights()[name]), name


def test_a_resumed_run_is_evaluated_and_predicts_with_the_average_before_it_trains() -> None:
    trained = engine_of(EmaPlugin(decay=0.9))
    trained.fit(data(), until="4 steps")
    resumed = engine_of(EmaPlugin(decay=0.9))
    resumed.load_state_dict(trained.state_dict())
    assert resumed.evaluate(data()) == trained.evaluate(data())
    assert all(map(torch.equal, resumed.predict(data()), trained.predict(data())))


def test_a_state_of_fewer_trained_weights_is_evaluated_with_theirs() -> None:
    """Fails if parameters unfrozen since are looked up in the restored average."""
    engine = engine_of(EmaPlugin(decay=0.9))
    engine.model[0].requires_grad_(False)
    engine.fit(data(), until="2 steps")
    snapshot, before = copy.deepcopy(engine.state_dict()), engine.evaluate(data())
    engine.model[0].requires_grad_(True)
    engine.fit(data(), until="4 steps")
    engine.load_state_dict(snapshot)
    assert engine.evaluate(data()) == before


def test_the_average_of_narrow_weights_is_wide() -> None:
    """Fails if a bfloat16 average never moves because its steps are below its resolution."""
    ema = EmaPlugin(decay=0.9999, ramp=False)
    engine = engine_of(ema, dtype=torch.bfloat16)
    before = {n: p.float().clone() for n, p in engine.model.named_parameters()}
    engine.fit(data(torch.bfloat16), until="5 steps")
    assert {value.dtype for value in ema.weights().values()} == {torch.float32}
    assert not torch.equal(ema.weights()["0.weight"], before["0.weight"])


def test_an_average_of_another_model_is_refused() -> None:
    """Fails if a resumed run averages parameters that do not belong together."""
    ema = EmaPlugin()
    ema.load_state_dict({"average": {"strange": torch.ones(1)}, "updates": 1})
    with pytest.raises(CheckpointError, match="saved average has 'strange', which the model lacks"):
        engine_of(ema).fit(data(), until="1 step")


@pytest.mark.parametrize("every", [1, 3])
def test_a_sparse_average_with_a_power_and_buffers_is_that_of_a_loop_by_hand(every: int) -> None:
    """Fails if updates happen at other steps, ramp differently, or omit running statistics."""
    ema = EmaPlugin(decay=0.8, power=0.75, update_every=every, buffers=True)
    engine, twin = engine_of(ema), engine_of()
    average = copy.deepcopy(twin.model)
    for place, _ in enumerate(twin.steps(data(), until="9 steps"), start=1):
        if place % every:
            continue
        keep = min(0.8, 1 - (place // every) ** -0.75)
        for mean, now in zip(
            average.state_dict().values(), twin.model.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.mul_(keep).add_(now, alpha=1 - keep)
    engine.fit(data(), until="9 steps")
    for name, mean in ema.weights().items():
        torch.testing.assert_close(mean, average.state_dict()[name])
    assert "1.running_mean" in ema.weights()
    shown: list[Tensor] = []

    class LookPlugin(Plugin[PluginConfig]):
        @hookimpl
        def loss_terms(self, engine: Engine) -> None:
            shown.append(engine.model.get_buffer("1.running_var").clone())

    fresh = engine_of(again := EmaPlugin(decay=0.8, power=0.75, update_every=every, buffers=True),
                      LookPlugin())  # fmt: skip
    fresh.fit(data(), until="9 steps", eval_data=data())
    assert torch.equal(shown[-1], again.weights()["1.running_var"])
    assert torch.equal(
        fresh.model.get_buffer("1.running_var"), twin.model.get_buffer("1.running_var")
    )


def test_both_weights_are_evaluated_and_training_is_that_without() -> None:
    """Fails if the second evaluation uses the average, or leaves it in the model."""
    plain, both = engine_of(), engine_of(EmaPlugin(decay=0.9, evaluate="both"))
    average = engine_of(EmaPlugin(decay=0.9))
    found = [
        engine.fit(data(), until="6 steps", eval_data=data(), eval_every="2 steps").metrics
        for engine in (plain, both, average)
    ]
    assert found[1]["val_live/loss"] == found[0]["val/loss"]
    assert found[1]["val/loss"] == found[2]["val/loss"] != found[0]["val/loss"]
    assert "val_live_live/loss" not in found[1]
    assert torch.equal(_weight(plain), _weight(both))
