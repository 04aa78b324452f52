"""Scheduled numbers: their value at each step, and valid targets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import (
    ConfigError,
    Engine,
    Loss,
    LossConfig,
    Plugin,
    PluginConfig,
    TrainState,
    hookimpl,
)
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from nexus_plugins.schedule import RuleConfig, SchedulePlugin


class LossWorldPlugin(Loss[LossConfig]):
    """A term with a weight to schedule."""

    def units(self, batch: Tensor) -> float:
        return float(len(batch))

    def loss(self, batch: Tensor, output: Tensor) -> Tensor:
        return output.square().sum()


DATA = [torch.ones(2, 2)] * 64


def engine_of(*rules: dict[str, Any], **more: Any) -> Engine:
    torch.manual_seed(0)
    return Engine(
        nn.Sequential(nn.Linear(2, 2)),
        plugins=[
            OptimAdamwPlugin(lr=0.1),
            LossWorldPlugin(weight=9.0),
            SchedulePlugin(rules=list(rules)),
        ],
        log_every=1,
        **more,
    )


def test_a_weight_moves_from_the_first_step_to_the_last() -> None:
    """Fails if a step uses another step's value: total = weight x term in each log."""
    engine = engine_of({"target": "loss_world.weight", "start": 1, "end": 3, "over": "4 steps"})
    weights = []
    for _ in engine.steps(DATA, until="6 steps"):
        weights.append(engine.metrics["train/total_loss"] / engine.metrics["train/world_loss"])
    assert weights == pytest.approx([1, 1.5, 2, 2.5, 3, 3])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1, 1, 1, 2.75, 4.5, 6.25, 8, 8]),
        ("cosine", [1, 1, 1, 2.02513, 4.5, 6.97487, 8, 8]),
        ("exponential", [1, 1, 1, 8**0.25, 8**0.5, 8**0.75, 8, 8]),
        ("step", [1, 1, 1, 1, 1, 1, 8, 8]),
    ],
)
def test_the_way_is_a_pure_function_of_progress(shape: str, expected: list[float]) -> None:
    """Fails if a shape is wrong, or `begin` is ignored."""
    rule = RuleConfig(
        target="x.y", start=1, end=8, begin="20 tokens", over="40 tokens", shape=shape
    )
    assert [rule.value(TrainState(tokens=10 * i), None) for i in range(8)] == pytest.approx(
        expected, abs=1e-5
    )


def test_the_batch_can_grow() -> None:
    """Fails if `engine.accumulate` does not take effect from the next step on, as an integer."""
    engine = engine_of({"target": "engine.accumulate", "start": 1, "end": 4, "over": "6 steps"})
    samples = [state.samples for state in engine.steps(DATA, until="8 steps")]
    batches = [(b - a) // 2 for a, b in zip([0, *samples], samples, strict=False)]
    assert batches == [1, 2, 2, 2, 3, 4, 4, 4]


def test_settings_of_the_optimizer_can_move() -> None:
    """Fails if groups are not found by name, or a scheduled learning rate is overwritten."""
    engine = engine_of(
        {"target": "optimizer.all.matrices.weight_decay", "start": 0.5, "end": 0.0, "over": 4},
        {"target": "optimizer.lr", "start": 0.2, "end": 0.1, "over": 4},
    )
    used: list[tuple[float, float, float]] = []
    stepping = engine.hook.optimizer_step

    def noted(**given: Any) -> Any:
        matrices, others = engine.optimizer.param_groups
        assert matrices["lr"] == others["lr"]
        used.append((matrices["weight_decay"], others["weight_decay"], matrices["lr"]))
        return stepping(**given)

    engine.hook.optimizer_step = noted
    logged = [engine.metrics["train/learning_rate"] for _ in engine.steps(DATA, until="6 steps")]
    shares = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    decays, fixed, rates = zip(*used, strict=True)
    assert decays == pytest.approx([0.5 * (1 - share) for share in shares])
    assert fixed == (0.0,) * 6
    assert rates == pytest.approx([0.2 - 0.1 * share for share in shares])
    assert logged == pytest.approx(rates), "what is logged is what was trained with"


class WatchPlugin(Plugin[PluginConfig]):
    """Records a setting at each update."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.used: list[float] = []

    @hookimpl
    def optimizer_step(self, engine: Engine) -> None:
        self.used.append(engine.optimizer.param_groups[0][self.key])


@pytest.mark.parametrize(
    ("key", "given"), [("weight_decay", {}), ("momentum", {}), ("lr", {"lr": 1})], ids=str
)
def test_a_setting_that_was_given_as_an_int_moves_by_fractions(
    key: str, given: dict[str, Any]
) -> None:
    """Fails if an integer default of 0 makes the optimizer use rounded values."""
    model, target, watch = nn.Linear(2, 1), f"optimizer.{key}", WatchPlugin(key)
    rule = {"target": target, "start": 0.01, "end": 0.05, "over": "4 steps"}
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), **{"lr": 0.1, **given}),
        loss=lambda model, batch: model(batch).square().mean(),
        plugins=[SchedulePlugin(rules=[rule]), watch],
        log_every=1,
    )
    logged = [engine.metrics[f"schedule/{target}"] for _ in engine.steps(DATA, until="6 steps")]
    assert watch.used == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, 0.05])
    assert logged == watch.used, "what is logged is what was trained with"


def test_rules_go_on_after_a_state_was_loaded_into_the_run() -> None:
    """Fails if rules no longer reach the optimizer after a rollback (by guard)."""
    watch = WatchPlugin("weight_decay")
    saved: list[Any] = []

    class ReturningPlugin(Plugin[PluginConfig]):
        """Restores the state of step 2 after step 4, and continues counting."""

        @hookimpl(trylast=True)
        def on_step(self, engine: Engine) -> None:
            if engine.state.step == 2:
                saved.append(copy.deepcopy(engine.state_dict()))
            if engine.state.step == 4:
                engine.rewind(saved[0])

    model = nn.Linear(2, 1)
    rule = {"target": "optimizer.weight_decay", "start": 0.0, "end": 0.8, "over": "8 steps"}
    Engine(
        model,
        torch.optim.AdamW(model.parameters()),
        loss=lambda model, batch: model(batch).square().mean(),
        plugins=[SchedulePlugin(rules=[rule]), watch, ReturningPlugin()],
    ).fit(DATA, until="8 steps")
    assert watch.used == pytest.approx([0.1 * step for step in range(8)])


@pytest.mark.parametrize("name", ["optimizer", "optimizer.all"])
def test_one_name_may_mean_several_groups(name: str) -> None:
    """Fails if a rule only reaches one of several groups with its name."""
    engine = engine_of({"target": f"{name}.weight_decay", "start": 0.5, "end": 0.5})
    engine.fit(DATA, until="1 step")
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.5, 0.5]


def test_a_whole_number_is_logged_as_it_is() -> None:
    """Fails if the log shows a fraction although the run uses an integer."""
    engine = engine_of({"target": "engine.accumulate", "start": 1, "end": 4, "over": "6 steps"})
    logged = []
    for _ in engine.steps(DATA, until="4 steps"):
        logged.append(engine.metrics["schedule/engine.accumulate"])
    assert logged == [2, 2, 2, 3]


def test_a_learning_rate_that_no_rule_moves_is_left_alone() -> None:
    """Fails if scheduling a weight prevents the program from setting the learning rate."""
    engine = engine_of({"target": "loss_world.weight", "start": 1, "end": 3})
    for state in engine.steps(DATA, until="2 steps"):
        for group in engine.optimizer.param_groups:
            assert state.step == 1 or group["lr"] == 0.025
            group["lr"] = 0.025


def test_a_resumed_run_ends_in_the_same_bits() -> None:
    """Fails if a scheduled number restarts after a crash."""
    rules = (
        {"target": "loss_world.weight", "start": 1, "end": 3, "over": "8 steps"},
        {"target": "engine.accumulate", "start": 1, "end": 3, "over": "6 steps"},
    )
    whole, first, second = (engine_of(*rules) for _ in range(3))
    whole.fit(DATA, until="10 steps")
    first.fit(DATA, until="5 steps")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(DATA, until="10 steps")
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("loss_word.weight", r"no 'loss_word'\. Did you mean 'loss_world'"),
        ("loss_world.wieght", r"no 'wieght'\. Did you mean 'weight'"),
        ("loss_world.config", "no 'config'"),
        ("optimizer.matrices.lr", "no 'optimizer.matrices'.*Did you mean 'optimizer.all.matrices'"),
        ("optimizer.momentum", "no 'momentum'"),
        ("engine.seed", r"no 'seed'\. Known: accumulate"),
        ("weight", "no 'weight'"),
    ],
)
def test_a_target_that_is_no_number_of_the_run_is_refused(target: str, words: str) -> None:
    """Fails if a misspelt target is accepted."""
    engine = engine_of({"target": target, "start": 1, "end": 2})
    with pytest.raises(ConfigError, match=words):
        engine.fit(DATA, until="1 step")


def test_rules_without_sense_are_refused() -> None:
    """Fails if a geometric schedule through zero is accepted."""
    with pytest.raises(ConfigError, match="needs nonzero start and end"):
        SchedulePlugin(rules=[{"target": "a.b", "start": 0, "end": 1, "shape": "exponential"}])
    with pytest.raises(ConfigError, match="begin must be in %"):
        SchedulePlugin(rules=[{"target": "a.b", "start": 0, "end": 1, "begin": "5 tokens"}])
