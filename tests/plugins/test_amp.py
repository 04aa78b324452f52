"""Mixed precision: where it computes in 16 bits, and how fp16 survives an overflow."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, Loss, LossConfig, Plugin, PluginConfig, Step, hookimpl
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.clip import ClipPlugin


class WatchPlugin(Plugin[PluginConfig]):
    """Records dtypes and norms during the step."""

    after = ("amp",)
    before = ("clip",)

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.gradients: list[Tensor] = []

    @hookimpl
    def loss_terms(self, engine: Engine, output: Any) -> dict[str, Tensor]:
        self.dtypes += [output.dtype, (output @ output.T).dtype]
        return {}

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        self.gradients.append(next(engine.model.parameters()).grad.clone())


class PartPlugin(Loss[LossConfig]):
    """A mean square as a separate term."""

    def __init__(self, name: str, factor: float = 1.0) -> None:
        super().__init__()
        self.name = self.term = name  # type: ignore[misc]
        self.factor = factor

    def units(self, batch: Any) -> float:
        return float(len(batch))

    def loss(self, batch: Any, output: Tensor) -> Tensor:
        return self.factor * output.float().square().sum()


def engine_of(*plugins: Plugin[Any], lr: float = 0.1, fused: bool = True, **more: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=lr, fused=fused),
        plugins=[*plugins, PartPlugin("part")],
        log_every=1,
        **more,
    )


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_model_and_losses_compute_in_16_bits_and_weights_stay(name: str, dtype: Any) -> None:
    """Fails if autocast does not reach the model, the losses or the evaluation."""
    watch = WatchPlugin()
    engine = engine_of(AmpPlugin(dtype=name), watch)
    engine.fit(data(), until="1 step", eval_data=data(1))
    assert watch.dtypes == [dtype] * 4
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert {g.dtype for g in watch.gradients} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu"), "autocast ends with the hooks"


def test_gradients_are_unscaled_before_others_see_them() -> None:
    """Fails if guard, clipping or logs see gradients 1024 times too large."""
    plain, scaled = WatchPlugin(), WatchPlugin()
    engine_of(plain).fit(data(), until="1 step")
    amp = AmpPlugin(dtype="fp16", initial_scale=1024.0)
    engine_of(ClipPlugin(max_norm=1e9), scaled, amp).fit(data(), until="1 step")
    torch.testing.assert_close(scaled.gradients[0], plain.gradients[0], rtol=2e-2, atol=1e-3)


def test_several_terms_are_scaled_once_each() -> None:
    """Fails if the scale is applied twice, or only to some terms."""
    plain, scaled = WatchPlugin(), WatchPlugin()
    engine_of(plain, PartPlugin("other", 0.5)).fit(data(), until="1 step")
    amp = AmpPlugin(dtype="fp16", initial_scale=512.0)
    engine_of(amp, scaled, PartPlugin("other", 0.5), accumulate=1).fit(data(), until="1 step")
    torch.testing.assert_close(scaled.gradients[0], plain.gradients[0], rtol=2e-2, atol=1e-3)


class LossesPlugin(Plugin[PluginConfig]):
    """Keeps the losses of the last step."""

    @hookimpl
    def on_step(self, step: Step) -> None:
        self.losses = step.losses


def test_a_loss_that_comes_out_in_16_bits_is_summed_and_scaled_in_32() -> None:
    """Fails if a plain loss function in fp16 stops the backward pass at the scaler's hook."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda model, batch: model(batch).square().mean(),
        plugins=[AmpPlugin(dtype="fp16", initial_scale=16.0), seen := LossesPlugin()],
    )
    engine.fit(data(), until="3 steps")
    assert seen.losses["loss"].dtype == torch.float32
    assert engine.metrics["amp/skipped_steps"] == 0


@pytest.mark.parametrize("fused", [True, False])
def test_after_an_overflow_the_scale_falls_the_step_is_skipped_and_the_run_recovers(
    fused: bool,
) -> None:
    """Fails if an overflow reaches the weights, goes unnoticed, or stops learning."""
    amp = AmpPlugin(dtype="fp16", initial_scale=2.0**40)
    engine = engine_of(amp, ClipPlugin(max_norm=1.0), lr=0.01, fused=fused)
    start = copy.deepcopy(engine.model.state_dict())
    logs = []
    for state in engine.steps(data(), until="60 steps"):
        logs.append(dict(engine.metrics))
        if state.step == 1:
            assert all(torch.equal(start[n], p) for n, p in engine.model.state_dict().items())
            assert not torch.isfinite(torch.tensor(engine.metrics["train/grad_norm"]))
    assert logs[0]["amp/scale"] == 2.0**39
    assert logs[0]["amp/skipped_steps"] == 1
    skipped = int(logs[-1]["amp/skipped_steps"])
    assert 10 < skipped < 40
    assert logs[-1]["amp/scale"] == 2.0 ** (40 - skipped)
    assert all(bool(torch.isfinite(p).all()) for p in engine.model.parameters())
    assert logs[-1]["train/total_loss"] < 0.7 * logs[0]["train/total_loss"]


def test_a_resumed_run_ends_in_the_same_bits() -> None:
    """Fails if the scale, its growth or the count of skipped steps is lost in a checkpoint."""

    def fresh() -> Engine:
        return engine_of(AmpPlugin(dtype="fp16", initial_scale=2.0**24, growth_interval=3))

    whole, first, second = fresh(), fresh(), fresh()
    whole.fit(data(), until="24 steps")
    first.fit(data(), until="13 steps")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(data(), until="24 steps")
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for key in ("amp/scale", "amp/skipped_steps"):
        assert whole.metrics[key] == second.metrics[key] > 0


def test_a_state_that_is_loaded_within_a_run_keeps_the_scaler_at_work() -> None:
    """Fails if a rollback (by guard) ends the scaling, or keeps the newer scale."""
    amp = AmpPlugin(dtype="fp16", initial_scale=2.0**10, growth_interval=3)
    engine = engine_of(amp)
    scales, saved = [], {}
    for state in engine.steps(data(), until="8 steps"):
        scales.append(engine.metrics["amp/scale"])
        if state.step == 2:
            saved = copy.deepcopy(amp.state_dict())
        if state.step == 4:
            amp.load_state_dict(saved)
    assert [int(math.log2(scale)) for scale in scales] == [10, 10, 11, 11, 11, 11, 11, 12]
    assert engine.metrics["amp/skipped_steps"] == 0


@pytest.mark.parametrize(
    ("settings", "half", "words"),
    [
        ({"tf32": True}, False, "TF32 needs a CUDA device"),
        ({"dtype": "bf16"}, True, "the weights are torch.float16, expected float32"),
    ],
)
def test_refuses_what_cannot_be(settings: dict[str, Any], half: bool, words: str) -> None:
    """Fails if a run continues without the requested precision."""
    engine = engine_of(AmpPlugin(**settings))
    if half:
        engine.model.half()
    with pytest.raises(ConfigError, match=words):
        engine.fit(data(), until="1 step")
    assert engine.state.step == 0


def test_refuses_a_device_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a device without autocast silently computes in full precision."""
    monkeypatch.setattr("nexus_plugins.amp.is_autocast_available", lambda kind: False)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, loss=lambda m, b: m(b).sum(), plugins=[AmpPlugin()])
    with pytest.raises(ConfigError, match="no autocast on cpu; run on cpu or cuda"):
        engine.fit([torch.ones(1, 2)], until="1 step")


def test_unknown_dtypes_are_refused_by_name() -> None:
    """Fails if a misspelt dtype is mistaken for the default."""
    with pytest.raises(ConfigError, match=r"amp\.dtype"):
        AmpPlugin(dtype="float16")
