"""The same run in any unit of length: learning rates and weights of a handwritten loop."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, hookimpl
from nexus_core.bases.schedule import Schedule
from nexus_plugins.lr_cosine import LrCosinePlugin
from nexus_plugins.lr_linear import LrLinearPlugin

ROWS, LENGTH, BASE = 2, 4, 0.1
SHAPES = {
    LrLinearPlugin: lambda done: 1 - done,
    LrCosinePlugin: lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


class RatesPlugin(Plugin[PluginConfig]):
    """Records the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.rates.append(engine.optimizer.param_groups[0]["lr"])


class EvaluationsPlugin(Plugin[PluginConfig]):
    """Records the steps of evaluations and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated, self.logged = list[int](), list[int]()

    @hookimpl
    def on_eval(self, engine: Engine) -> None:
        self.evaluated.append(engine.state.step)

    @hookimpl
    def on_log(self, engine: Engine) -> None:
        self.logged.append(engine.state.step)


class Unsized:
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def batches_of(count: int) -> list[dict[str, Tensor]]:
    """Batches of two rows with four tokens each."""
    generator = torch.Generator().manual_seed(count)
    return [
        {"input_ids": torch.randint(9, (ROWS, LENGTH), generator=generator)} for _ in range(count)
    ]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["input_ids"]) - 1).square().mean()


def run(
    plugin: type[Schedule[Any]], warmup: str, data: Any, accumulate: int, until: str
) -> tuple[list[float], list[Tensor], Engine]:
    model, rates = new_model(), RatesPlugin()
    schedule = plugin(warmup=warmup, min_lr=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE, momentum=0.9)
    plugins = [schedule, rates]
    engine = Engine(model, optimizer, loss=loss, plugins=plugins, accumulate=accumulate)
    engine.fit(data, until=until)
    return rates.rates, list(model.parameters()), engine


def by_hand(
    shape: Any, warmup: int | Fraction, data: list[Any], accumulate: int, steps: int
) -> tuple[list[float], list[Tensor]]:
    """The oracle: a plain loop over micro-batches, the rate set before each step."""
    model, rates = new_model(), list[float]()
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE, momentum=0.9)
    for step in range(steps):
        done = max(0.0, float((step - warmup) / (steps - warmup)))
        rise = min(1.0, float((step + 1) / warmup)) if warmup else 1.0
        rates.append(BASE * (rise * shape(done)))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.zero_grad()
        for place in range(accumulate):
            batch = data[(step * accumulate + place) % len(data)]
            value = loss(model, batch)
            (value / accumulate if accumulate > 1 else value).backward()
        optimizer.step()
    return rates, list(model.parameters())


@given(
    length=st.integers(1, 7),
    epochs=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    warmup=st.integers(0, 3) | st.integers(1, 999).map(lambda count: Fraction(count, 1000)),
    plugin=st.sampled_from(list(SHAPES)),
)
@settings(max_examples=15, deadline=None)
def test_every_unit_of_a_horizon_gives_the_rates_and_the_weights_of_a_loop_by_hand(
    length: int, epochs: int, accumulate: int, warmup: int | Fraction, plugin: type[Schedule[Any]]
) -> None:
    """Fails if progress counts what is read instead of what is done, if a share is rounded
    differently in some unit, or if the first step has no effect.
    """
    data = batches_of(length)
    steps = length * epochs  # of `accumulate` micro-batches each
    rows = steps * accumulate * ROWS
    untils = [f"{steps} steps", f"{epochs * accumulate} epochs"]
    is_share = isinstance(warmup, Fraction)
    if is_share or not warmup:  # steps cannot be converted to rows or tokens
        untils += [f"{rows} samples", f"{rows * LENGTH} tokens"]
    rise = warmup * steps if is_share else min(warmup, steps - 1)
    rates, weights = by_hand(SHAPES[plugin], rise, data, accumulate, steps)
    for until in untils:
        said = f"{float(warmup * 100)}%" if is_share else f"{rise} steps"
        found, trained, engine = run(plugin, said, data, accumulate, until)
        assert found == rates, until
        assert all(map(torch.equal, trained, weights)), until
        assert engine.state.samples == rows
        assert engine.state.tokens == rows * LENGTH


def test_a_share_that_is_a_whole_number_of_steps_is_those_steps() -> None:
    data = batches_of(4)
    share, steps = (run(LrLinearPlugin, w, data, 1, "8 steps")[0] for w in ("37.5%", "3 steps"))
    assert share == steps


def test_periods_may_be_shares_and_follow_a_later_horizon() -> None:
    """Fails if a resumed run evaluates by its former horizon."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE)
    seen = EvaluationsPlugin()
    engine = Engine(model, optimizer, loss=loss, plugins=[seen], log_every="50%")
    data = batches_of(4)
    engine.fit(data, until="10 steps", eval_data=data, eval_every="25%")
    assert (seen.evaluated, seen.logged) == ([3, 5, 8, 10], [5, 10])
    engine.fit(data, until="20 steps", eval_data=data, eval_every="25%")
    assert (seen.evaluated[4:], seen.logged[2:]) == ([15, 20], [20])


@pytest.mark.parametrize("until", ["10%", "100%"])
def test_a_horizon_is_no_share_of_itself(until: str) -> None:
    engine = Engine(model := new_model(), torch.optim.SGD(model.parameters()), loss=loss)
    with pytest.raises(ConfigError, match=f"is '{until}', a share of itself"):
        engine.fit(batches_of(2), until=until)


@given(
    length=st.sampled_from([2, 4, 5, 8, 10]), part=st.integers(1, 20), accumulate=st.integers(1, 3)
)
@settings(max_examples=15, deadline=None)
def test_parts_of_epochs_end_at_their_batch_with_the_rates_of_steps(
    length: int, part: int, accumulate: int
) -> None:
    """Fails if 0.3 of ten batches are four, since three tenths are not quite 0.3."""
    data, until = batches_of(length), f"{part * accumulate / length:g} epochs"
    found, trained, _ = run(LrLinearPlugin, "0", data, accumulate, until)
    rates, weights = by_hand(SHAPES[LrLinearPlugin], 0, data, accumulate, part)
    assert found == rates
    assert all(map(torch.equal, trained, weights))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_without_a_length_ends_with_its_epochs(accumulate: int) -> None:
    """The rate falls per epoch until the first has shown its length, then per batch."""
    data = batches_of(4)
    model, rates = new_model(), RatesPlugin()
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE)
    plugins = [LrLinearPlugin(warmup=None, min_lr=0.0), rates]
    engine = Engine(model, optimizer, loss=loss, plugins=plugins, accumulate=accumulate)
    engine.fit(Unsized(data), until="2 epochs")
    steps = 4 // accumulate
    known = [BASE * (1 - place / (2 * steps)) for place in range(steps, 2 * steps)]
    assert rates.rates == [BASE] * steps + known
    assert (engine.state.epoch, engine.state.samples) == (2, 8 * ROWS)


@pytest.mark.parametrize(("until", "every"), [("1.5 epochs", None), ("2 epochs", "0.5 epochs")])
def test_a_part_of_an_epoch_needs_a_length(until: str, every: str | None) -> None:
    model = new_model()
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=BASE), loss=loss)
    data = Unsized(batches_of(4))
    with pytest.raises(ConfigError, match=r"fraction of an epoch.*__len__"):
        engine.fit(data, until=until, eval_data=data, eval_every=every)
