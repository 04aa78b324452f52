"""GAN, LBFGS and SAM as in `examples/`: the oracle is a handwritten loop."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.lr_linear import LrLinearPlugin

sys.path.append(str(Path(__file__).parents[2] / "examples"))
GanPlugin = importlib.import_module("08_gan").GanPlugin
SamPlugin = importlib.import_module("10_sam").SamPlugin

STEPS, MAX_NORM, DECAY, RATE = 10, 0.3, 0.5, 0.05
BATCHES = [torch.randn(4, 2, generator=torch.Generator().manual_seed(n)) + 1 for n in range(5)]
Take = Callable[[int], list[Tensor]]
"""The micro-batches of a step, by its number from 0."""


def net(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, outputs))


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


class SlowPlugin(GanPlugin):
    """Trains the generator only in every fifth step."""

    @hookimpl
    def take_turns(self, step: Any) -> list[str]:
        return ["critic"] if step.number % 5 else ["critic", "generator"]


class GanCase:
    """Alternating turns, or several of the critic for one of the generator."""

    def __init__(self, critic_steps: int) -> None:
        self.critic_steps = critic_steps

    def parts(self) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = nn.ModuleList([net(1), net(2)])
        adams = [torch.optim.Adam(part.parameters(), lr=0.02) for part in model]
        return model, {"critic": adams[0], "generator": adams[1]}

    def engine(self, *plugins: Plugin[Any], **options: Any) -> Engine:
        gan = GanPlugin() if self.critic_steps == 1 else SlowPlugin()
        return Engine(*self.parts(), plugins=[gan, *plugins], **options)

    def by_hand(self, take: Take, seed: int, after: Callable[[nn.Module], None]) -> list[Tensor]:
        torch.manual_seed(seed)
        (critic, generator), optimizers = parts = self.parts()
        torch.manual_seed(seed)
        for step in range(STEPS):
            micro = take(step)
            rows = float(sum(map(len, micro)))
            turns = ["critic"] if (step + 1) % self.critic_steps else ["critic", "generator"]
            for turn in turns:
                optimizer = optimizers[turn]
                for group in (g for o in optimizers.values() for g in o.param_groups):
                    group["lr"] = 0.02 * (1 - step / STEPS)
                parts[0].zero_grad()
                for batch in micro:
                    real, fake = critic(batch), critic(generator(torch.randn(len(batch), 2)))
                    terms = (
                        softplus(-real) + softplus(fake) if turn == "critic" else softplus(-fake)
                    )
                    (terms.sum() / rows).backward()
                clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], MAX_NORM)
                optimizer.step()
            after(parts[0])
        return list(parts[0].parameters())


class LbfgsCase:
    """An optimizer that needs a closure."""

    def __init__(self, search: str | None) -> None:
        self.search = search

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        search = self.search
        optimizer = torch.optim.LBFGS(
            model.parameters(), lr=RATE, max_iter=4, line_search_fn=search
        )
        return model, optimizer

    def engine(self, *plugins: Plugin[Any], **options: Any) -> Engine:
        return Engine(*self.parts(), loss=mean_loss, plugins=plugins, **options)

    def by_hand(self, take: Take, seed: int, after: Callable[[nn.Module], None]) -> list[Tensor]:
        model, optimizer = self.parts()
        for step in range(STEPS):
            micro = take(step)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)

            def closure(micro: list[Tensor] = micro) -> float:
                return gradient_by_hand(model, micro)

            optimizer.step(closure)
            after(model)
        return list(model.parameters())


class SamCase:
    """The gradient at the worst point nearby, with new dropout there."""

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = net(1)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def engine(self, *plugins: Plugin[Any], **options: Any) -> Engine:
        return Engine(*self.parts(), loss=mean_loss, plugins=[SamPlugin(), *plugins], **options)

    def by_hand(self, take: Take, seed: int, after: Callable[[nn.Module], None]) -> list[Tensor]:
        model, optimizer = self.parts()
        torch.manual_seed(seed)
        parameters = list(model.parameters())
        for step in range(STEPS):
            micro = take(step)
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / STEPS)
            gradient_by_hand(model, micro)
            with torch.no_grad():
                before = [p.clone() for p in parameters]
                length = torch.stack([p.grad.norm() for p in parameters]).norm()
                for p in parameters:
                    p.add_(p.grad * (SamPlugin.radius / (length + 1e-12)))
            gradient_by_hand(model, micro)
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
            optimizer.step()
            after(model)
        return parameters


def gradient_by_hand(model: nn.Module, micro: list[Tensor]) -> float:
    """The clipped gradient of the mean over micro-batches, and the loss."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in micro:
        loss = mean_loss(model, batch) / len(micro)
        loss.backward()
        total = total + loss.detach()
    clip_grad_norm_(model.parameters(), MAX_NORM)
    return total.item()


CASES = {
    "gan": GanCase(1),
    "gan 5:1": GanCase(5),
    "lbfgs": LbfgsCase(None),
    "lbfgs with a line search": LbfgsCase("strong_wolfe"),
    "sam": SamCase(),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def acting() -> list[Plugin[Any]]:
    return [ClipPlugin(max_norm=MAX_NORM), LrLinearPlugin(warmup=None, min_lr=0.0)]


def taker(accumulate: int) -> Take:
    flow: Iterator[Tensor] = itertools.cycle(BATCHES)
    return lambda step: [next(flow) for _ in range(accumulate)]


@cases
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_are_those_of_the_loop_by_hand(case: Any, accumulate: int) -> None:
    """With clip, a schedule, guard and ema."""
    ema = EmaPlugin(decay=DECAY, ramp=False)
    plugins = [*acting(), GuardPlugin(), ema]
    engine = case.engine(*plugins, seed=7, accumulate=accumulate)
    torch.manual_seed(7)
    engine.fit(BATCHES, until=STEPS)

    average: list[Tensor] = [p.detach().clone() for p in case.parts()[0].parameters()]

    def follow(model: nn.Module) -> None:
        for mean, p in zip(average, model.parameters(), strict=True):
            mean.lerp_(p.detach(), torch.tensor(1 - DECAY))

    expected = case.by_hand(taker(accumulate), 7, follow)
    assert all(map(torch.equal, engine.model.parameters(), expected))
    assert all(map(torch.equal, ema.weights().values(), average))
    assert engine.state.samples == STEPS * accumulate * 4


@cases
@pytest.mark.parametrize("precise", [True, False], ids=["float32", "bf16"])
def test_resumed_on_a_fresh_engine_it_ends_in_the_same_bits(case: Any, precise: bool) -> None:
    """The states of several optimizers, and of one with a history, are restored."""

    def engine() -> Engine:
        amp = [] if precise else [AmpPlugin(dtype="bf16")]
        plugins = [*acting(), GuardPlugin(), EmaPlugin(), *amp]
        return case.engine(*plugins, seed=7, accumulate=2, log_every=3)

    whole, first = engine(), engine()
    torch.manual_seed(7)
    whole.fit(BATCHES, until=STEPS)
    torch.manual_seed(7)
    for state in first.steps(BATCHES, until=STEPS):
        if state.step == 4:
            break
    snapshot = copy.deepcopy(first.state_dict())
    again = engine()
    again.load_state_dict(snapshot)
    again.fit(BATCHES, until=STEPS)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    assert again.metrics == whole.metrics
    ends = [e.plugins["ema"].weights() for e in (whole, again)]
    assert all(map(torch.equal, ends[0].values(), ends[1].values()))


@pytest.mark.parametrize("name", ["lbfgs", "sam"])
def test_fp16_refuses_a_second_look_at_the_gradient_by_name(name: str) -> None:
    engine = CASES[name].engine(AmpPlugin(dtype="fp16"))
    with pytest.raises(ConfigError, match=r"amp: .*fp16 .*set amp.dtype to bf16"):
        engine.fit(BATCHES, until=STEPS)
    assert engine.state.step == 0


def test_fp16_scales_each_optimizer_of_a_game() -> None:
    """Powers of two scale exactly, so the numbers equal those with scale one."""
    ends = []
    for scale in (1.0, 1024.0):
        amp = AmpPlugin(dtype="fp16", initial_scale=scale)
        engine = CASES["gan"].engine(*acting(), amp, seed=7)
        engine.fit(BATCHES, until=4)
        assert engine.state.step == 4
        assert engine.metrics["amp/skipped_steps"] == 0
        ends.append(list(engine.model.parameters()))
    start = list(CASES["gan"].parts()[0].parameters())
    for one, other, before in zip(*ends, start, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
        assert not torch.equal(one, before)


class BadBatchPlugin(Plugin[PluginConfig]):
    """Puts a non-finite number into the third step."""

    @hookimpl
    def on_batch(self, engine: Engine, batch: Tensor) -> Tensor | None:
        return batch * float("nan") if engine.state.step == 2 else None


def _refused_at_the_third(engine: Engine, ema: EmaPlugin) -> list[Tensor]:
    """Four steps, of which the third changes nothing; returns the result."""
    seen: dict[int, list[Tensor]] = {}

    def watch() -> None:
        for state in engine.steps(BATCHES, until=4):
            values = [*engine.model.parameters(), *ema.weights().values()]
            seen[state.step] = [value.detach().clone() for value in values]

    with pytest.warns(RuntimeWarning, match="skipped the update of step 3"):
        watch()
    assert all(map(torch.equal, seen[2], seen[3]))
    assert not any(map(torch.equal, seen[3][:2], seen[4][:2]))
    return seen[4]


@cases
def test_a_refused_step_leaves_weights_and_average_of_every_turn(case: Any) -> None:
    ema = EmaPlugin(decay=DECAY, ramp=False)
    engine = case.engine(GuardPlugin(), ClipPlugin(), ema, BadBatchPlugin())
    after = _refused_at_the_third(engine, ema)
    assert all(value.isfinite().all() for value in after)


class BadClimbPlugin(Plugin[PluginConfig]):
    """Corrupts the gradient of the third step, only when it is recomputed."""

    @hookimpl
    def after_backward(self, engine: Engine, step: Any) -> None:
        if step.again and step.number == 3:
            engine.parameters()[0].grad.mul_(float("nan"))


def test_a_gradient_that_is_bad_only_when_computed_again_is_refused_too() -> None:
    ema = EmaPlugin(decay=DECAY, ramp=False)
    engine = CASES["sam"].engine(GuardPlugin(), ClipPlugin(), ema, BadClimbPlugin(), log_every=1)
    _refused_at_the_third(engine, ema)
    assert engine.metrics["guard/skipped_steps"] == 1


def test_a_list_of_optimizers_steps_all_of_them() -> None:
    torch.manual_seed(0)
    model = net(1).eval()
    twin = copy.deepcopy(model)
    engine = Engine(model, [torch.optim.SGD(model[0].parameters(), lr=0.1),
                            torch.optim.Adam(model[3].parameters())], loss=mean_loss)  # fmt: skip
    with pytest.warns(RuntimeWarning, match="evaluation mode"):
        engine.fit(BATCHES, until=5)
    optimizers = (
        torch.optim.SGD(twin[0].parameters(), lr=0.1),
        torch.optim.Adam(twin[3].parameters()),
    )
    for batch in BATCHES:
        twin.zero_grad()
        mean_loss(twin, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("wrong", [[], {}, ["adam"], torch.optim.SGD, "adam"], ids=repr)
def test_what_is_no_optimizer_is_refused_in_words(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="optimizer"):
        Engine(net(1), wrong, loss=mean_loss)


def test_a_turn_without_an_optimizer_names_those_there_are() -> None:
    class WrongPlugin(Plugin[PluginConfig]):
        @hookimpl
        def take_turns(self) -> list[str]:
            return ["discriminator"]

    engine = Engine(
        *CASES["gan"].parts(), loss=lambda m, b: m[0](b).mean(), plugins=[WrongPlugin()]
    )
    with pytest.raises(
        ConfigError, match="no optimizer for the turn 'discriminator', only 'critic'"
    ):
        engine.fit(BATCHES, until=1)
