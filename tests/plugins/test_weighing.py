"""Properties shared by all weighting methods, on a problem with scales 1:1000."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import Engine, Loss, LossConfig, Plugin, hookimpl
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.pcgrad import PcgradPlugin
from nexus_plugins.weigh_gradnorm import WeighGradnormPlugin
from nexus_plugins.weigh_magnitude import WeighMagnitudePlugin
from nexus_plugins.weigh_uncertainty import WeighUncertaintyPlugin

Make = Callable[[], list[Plugin[Any]]]

WAYS: dict[str, Make] = {
    "weigh_magnitude": lambda: [WeighMagnitudePlugin()],
    "weigh_uncertainty": lambda: [WeighUncertaintyPlugin()],
    "weigh_gradnorm": lambda: [WeighGradnormPlugin(every=1)],
    "pcgrad": lambda: [PcgradPlugin()],
    "pcgrad and weigh_magnitude": lambda: [PcgradPlugin(), WeighMagnitudePlugin()],
    "pcgrad and weigh_gradnorm": lambda: [WeighGradnormPlugin(every=3), PcgradPlugin()],
}


class SmallPlugin(Loss[LossConfig]):
    """The squared error of the first target."""

    target, factor = 0, 1.0

    def units(self, batch: dict[str, Tensor]) -> float:
        return float(len(batch["input"]))

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        error = output[:, self.target].float() - batch["y"][:, self.target]
        return self.factor * error.square().sum()


class LargePlugin(SmallPlugin):
    """The squared error of the second target, a thousand times as large."""

    target, factor = 1, 1000.0


class SometimesPlugin(SmallPlugin):
    """A term that only every other batch has."""

    @hookimpl
    def loss_units(self, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        return {"sometimes": self.units(batch)} if "flag" in batch else {}

    @hookimpl
    def loss_terms(self, batch: dict[str, Tensor], output: Tensor) -> dict[str, Tensor]:
        return {"sometimes": self.loss(batch, output)} if "flag" in batch else {}


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = torch.tanh(x @ torch.randn(8, 2, generator=generator))
    return [{"input": x[i : i + 32], "y": y[i : i + 32]} for i in range(0, 256, 32)]


def engine_of(*plugins: Plugin[Any], lr: float = 0.2) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        plugins=[SmallPlugin(), LargePlugin(), ClipPlugin(max_norm=1.0), *plugins],
        log_every=1,
    )


def falls(plugins: list[Plugin[Any]]) -> tuple[float, float]:
    """The value of each term after 400 steps, as a share of the start."""
    engine = engine_of(*plugins)
    before = engine.evaluate(data())
    after = engine.fit(data(), until="400 steps", eval_data=data()).metrics
    names = ("val/small_loss", "val/large_loss")
    small, large = (after[name] / before[name] for name in names)
    return small, large


def test_static_weights_starve_the_small_term() -> None:
    """Fails if static weights solve the problem, so that the tests below prove nothing."""
    small, large = falls([])
    assert small > 0.6
    assert large < 0.05


@pytest.mark.parametrize("way", [name for name in WAYS if name != "pcgrad and weigh_gradnorm"])
def test_both_terms_are_learned_where_static_weights_fail(way: str) -> None:
    """Fails if the weighting method does not solve the problem.

    PCGrad does not change scales, and only prevents the large term from harming the small one.
    """
    small, large = falls(WAYS[way]())
    assert small < (1 / 3 if way == "pcgrad" else 0.05)
    assert large < 0.05


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_in_the_same_bits(way: str) -> None:
    """Fails if anything that the weights depend on is not saved."""

    def fresh() -> Engine:
        return engine_of(*WAYS[way]())

    whole, first, second = fresh(), fresh(), fresh()
    whole.fit(data(), until="11 steps")
    first.fit(data(), until="5 steps")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(data(), until="11 steps")
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", WAYS)
def test_terms_may_come_and_go(way: str) -> None:
    """Fails if weights are assigned by position, or a missing term stops the run."""
    batches = data()
    for batch in batches[1::2]:
        batch["flag"] = torch.ones(1)
    engine = engine_of(SometimesPlugin(), *WAYS[way]())
    result = engine.fit(batches, until="12 steps")
    assert result.step == 12
    assert all(bool(torch.isfinite(p).all()) for p in engine.model.parameters())
    if "weigh" in way:
        assert {"weight/small", "weight/large", "weight/sometimes"} <= result.metrics.keys()


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_with_fp16_scaling(way: str) -> None:
    """Fails if the scaler's factor is ignored or applied twice when terms are separated."""
    plain = engine_of(*WAYS[way](), lr=0.05)
    scaled = engine_of(*WAYS[way](), AmpPlugin(dtype="fp16", initial_scale=64.0), lr=0.05)
    for engine in (plain, scaled):
        engine.fit(data(), until="5 steps")
    assert scaled.metrics["amp/skipped_steps"] == 0
    assert scaled.metrics["train/grad_norm"] == pytest.approx(
        plain.metrics["train/grad_norm"], rel=0.05
    )
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=5e-3)
