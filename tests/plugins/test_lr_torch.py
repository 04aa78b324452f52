"""Schedulers of PyTorch, transformers and timm: the rates of a plain loop, also when resumed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, Step, hookimpl
from nexus_core.places import only_named
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.checkpoint.codec import TensorBag, decode, encode
from nexus_plugins.lr_torch import LrTorchPlugin
from nexus_plugins.schedule import SchedulePlugin

CASES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 3, "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [2, 5], "gamma": 0.1}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
    ("PolynomialLR", {"total_iters": 10, "power": 2.0}),
    ("OneCycleLR", {"max_lr": 2.0, "total_steps": 12, "cycle_momentum": False}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3, "cycle_momentum": False}),
]


def engine_of(name: str, settings: dict[str, Any], *others: SchedulePlugin) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}], lr=0.5
    )
    plugin = LrTorchPlugin(scheduler=name, settings=settings)
    return Engine(model, optimizer, loss=lambda m, b: m(b).mean(), plugins=[plugin, *others])


def rates(engine: Engine, until: int) -> list[float]:
    data = [torch.ones(1, 2)]
    return [engine.optimizer.param_groups[0]["lr"] for _ in engine.steps(data, until=until)]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_rates_are_those_of_a_plain_loop(name: str, settings: dict[str, Any]) -> None:
    """Fails if the scheduler steps too early or too late, or from another base."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = getattr(lr_scheduler, name)(optimizer, **settings)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 12:
            scheduler.step()
    engine = engine_of(name, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rates(engine, 12) == pytest.approx(expected)
    first, second = (group["lr"] for group in engine.optimizer.param_groups)
    assert second == pytest.approx(first / 10), "groups keep their ratio"


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_resumed_run_has_the_same_rates(name: str, settings: dict[str, Any]) -> None:
    """Fails if the scheduler restarts after a crash."""
    whole, first, second = (engine_of(name, settings) for _ in range(3))
    expected = rates(whole, 12)
    rates(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert rates(second, 12) == expected[5:]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_resumed_run_has_the_same_rates_where_the_base_moves(
    name: str, settings: dict[str, Any]
) -> None:
    """Fails if the initial base rate is read after a rule has changed it."""
    rule = {"target": "optimizer.lr", "start": 0.5, "end": 0.1, "over": "10 steps"}
    whole, first, second = (
        engine_of(name, settings, SchedulePlugin(rules=[rule])) for _ in range(3)
    )
    expected = rates(whole, 12)
    rates(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert rates(second, 12) == expected[5:]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("StepLr", {}, r"is 'StepLr', which is not in torch.*Did you mean 'StepLR'"),
        ("no.such.place", {}, r"lr_torch\.scheduler: 'no' cannot be imported"),
        (
            "torch.optim.lr_scheduler:EPOCH_DEPRECATION_WARNING",
            {},
            "which is not a function or class",
        ),
        ("./absent.py:make", {}, r"lr_torch\.scheduler: no file './absent\.py'"),
        ("builtins.repr", {}, "builtins.repr returned .*; expected a scheduler"),
        ("StepLR", {"size": 3}, r"StepLR does not take the settings.*it takes step_size, gamma"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    """Fails if a misspelt scheduler or setting ends in a traceback, or is ignored."""
    with pytest.raises(ConfigError, match=words):
        rates(engine_of(name, settings), 2)


def test_a_config_that_nobody_named_imports_no_scheduler() -> None:
    """Fails if resuming somebody else's run executes code named in its config."""
    engine = engine_of("this:s", {})
    with only_named((), "name it yourself"), pytest.raises(ConfigError, match="name it yourself"):
        rates(engine, 2)
    assert "this" not in sys.modules


# -- schedulers over the run's own optimizer

STEPS, EPOCH, ACCUMULATE = 12, 3, 2
Optimizer = torch.optim.SGD
Make = Callable[[Optimizer], Any]


def rows(epoch: int) -> Iterator[torch.Tensor]:
    """The micro-batches of an epoch: three steps of two."""
    for number in range(EPOCH * ACCUMULATE):
        yield torch.full((2, 2), 0.1 * (1 + number + epoch % 2))


class Epochs:
    """Data whose batches depend on the epoch."""

    fingerprint = "epochs"

    def __len__(self) -> int:
        return EPOCH * ACCUMULATE

    def batches(self, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
        return iter(list(rows(epoch))[start:])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.batches(0)


def parts() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05, "momentum": 0.5}]
    return model, torch.optim.SGD(groups, lr=0.4, momentum=0.9)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def by_hand(make: Make, turn: Callable[[Any, int, int, float], None]) -> list[Any]:
    """Weights, rates and momenta after each step of a handwritten loop."""
    model, optimizer = parts()
    scheduler = make(optimizer)
    seen: list[Any] = []
    for epoch in range(STEPS // EPOCH):
        batches = list(rows(epoch))
        for place in range(EPOCH):
            optimizer.zero_grad()
            for batch in batches[place * ACCUMULATE : (place + 1) * ACCUMULATE]:
                (loss_of(model, batch) / ACCUMULATE).backward()
            used = [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
            optimizer.step()
            seen.append((used, model.weight.detach().clone(), model.bias.detach().clone()))
            with torch.no_grad():
                value = loss_of(model, torch.ones(1, 2)).item()
            turn(scheduler, epoch, place, value)
    return seen


def by_step(scheduler: Any, epoch: int, place: int, value: float) -> None:
    scheduler.step()


def by_epoch(scheduler: Any, epoch: int, place: int, value: float) -> None:
    if place == EPOCH - 1:
        scheduler.step()


def by_metric(scheduler: Any, epoch: int, place: int, value: float) -> None:
    if place == EPOCH - 1:
        scheduler.step(value)


def as_timm(scheduler: Any, epoch: int, place: int, value: float) -> None:
    scheduler.step_update(epoch * EPOCH + place + 1)
    if place == EPOCH - 1:
        scheduler.step(epoch + 1, value)


def from_transformers(optimizer: Optimizer) -> Any:
    transformers = pytest.importorskip("transformers", reason="its schedulers are compared")
    return transformers.get_scheduler("cosine", optimizer, 3, STEPS)


class HalvingScheduler:
    """A scheduler with timm's interface: given the progress, it sets a rate for each group."""

    def __init__(self, optimizer: Optimizer, t_in_epochs: bool) -> None:
        self.optimizer, self.t_in_epochs = optimizer, t_in_epochs
        self.base_values = [group["lr"] for group in optimizer.param_groups]
        self.metric: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def step(self, epoch: int, metric: float | None = None) -> None:
        self._set(epoch, metric, self.t_in_epochs)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        self._set(num_updates, metric, not self.t_in_epochs)

    def _set(self, at: int, metric: float | None, acts: bool) -> None:
        self.metric = metric
        for group, base in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"] = base * 0.5**at if acts else group["lr"]


def schedulers_of_timm() -> Any:
    """timm's package `scheduler`, without the rest, which needs torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm's schedulers are compared where timm is installed")
    bare = types.ModuleType("timm")
    bare.__path__ = list(found.submodule_search_locations or [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "timm", bare)
        return importlib.import_module("timm.scheduler")


def from_timm(name: str, **settings: Any) -> Make:
    def make(optimizer: Optimizer) -> Any:
        timm = schedulers_of_timm()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its plateau scheduler is deprecated
            return getattr(timm, name)(optimizer, **settings)

    return make


def sequential(optimizer: Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    then = lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.1)
    return lr_scheduler.SequentialLR(optimizer, [warm, then], milestones=[4])


SCHEDULERS: dict[str, tuple[Make, Any, dict[str, Any]]] = {
    "lambda": (
        lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1 / (1 + n), lambda n: 0.9**n]), by_step, {}
    ),
    "lambda, epochs": (
        lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)), by_epoch, {"every": "epoch"}
    ),
    "one cycle, with the momentum": (
        lambda o: lr_scheduler.OneCycleLR(o, [0.5, 0.1], total_steps=STEPS + 1), by_step, {}
    ),
    "milestones in a sequence": (sequential, by_step, {}),
    "plateau": (
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.3), by_metric, {}
    ),
    "transformers": (from_transformers, by_step, {}),
    "told, epochs": (lambda o: HalvingScheduler(o, True), as_timm, {}),
    "told, updates": (lambda o: HalvingScheduler(o, False), as_timm, {}),
    "timm, epochs": (from_timm("CosineLRScheduler", t_initial=4, warmup_t=1), as_timm, {}),
    "timm, updates": (
        from_timm("StepLRScheduler", decay_t=2.0, decay_rate=0.5, t_in_epochs=False), as_timm, {}
    ),
    "timm, plateau": (
        from_timm("PlateauLRScheduler", patience_t=0, threshold=0.3, cooldown_t=1), as_timm, {}
    ),
}  # fmt: skip


class WatchPlugin(Plugin[PluginConfig]):
    """Records what `by_hand` records."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self._seen = seen

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        used = [(group["lr"], group["momentum"]) for group in engine.optimizer.param_groups]
        weight, bias = engine.model.parameters()
        self._seen.append((used, weight.detach().clone(), bias.detach().clone()))


def run(
    make: Any, settings: dict[str, Any], seen: list[Any], *others: Plugin[Any], **o: Any
) -> Engine:
    model, optimizer = parts()
    plugin = LrTorchPlugin(make(optimizer) if o.pop("as_object", False) else make, **settings)
    plugins = [plugin, WatchPlugin(seen), *others]
    return Engine(model, optimizer, loss=loss_of, plugins=plugins, accumulate=ACCUMULATE, **o)


def fit(engine: Engine, until: int) -> None:
    held = [torch.ones(1, 2)]
    engine.fit(Epochs(), until=until, eval_data=held, eval_every="1 epochs")


def cut(engine: Engine, after: int) -> Engine:
    """Train some steps of the run, then stop like a kill."""
    data, held = Epochs(), [torch.ones(1, 2)]
    for state in engine.steps(data, until=STEPS, eval_data=held, eval_every="1 epochs"):
        if state.step == after:
            break
    return engine


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("as_object", [True, False], ids=["object", "factory"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_weights_rates_and_momenta_are_those_of_a_loop_by_hand(name: str, as_object: bool) -> None:
    """Fails if a scheduler steps at another moment than in the loop it was written for."""
    make, turn, settings = SCHEDULERS[name]
    seen: list[Any] = []
    fit(run(make, settings, seen, as_object=as_object), STEPS)
    expected = by_hand(make, turn)
    assert same(seen, expected)
    assert len({tuple(used) for used, *_ in expected}) > 1, "the rates move"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_that_is_resumed_from_a_file_has_the_same_bits(name: str, tmp_path: Path) -> None:
    """Fails if part of a scheduler's state is lost, or cannot be stored."""
    make, _, settings = SCHEDULERS[name]
    expected: list[Any] = []
    fit(run(make, settings, expected), STEPS)
    out: dict[str, Any] = {"out": tmp_path}
    cut(run(make, settings, [], CheckpointPlugin(every=4, sync=True), **out), 7)
    seen: list[Any] = []
    engine = run(make, settings, seen, CheckpointPlugin(every=4), **out)
    engine.resume("auto")
    begin = engine.state.step
    assert 4 <= begin < 7
    fit(engine, STEPS)
    assert same(seen, expected[begin:])


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("ReduceLROnPlateau", {"patience": 0, "threshold": 0.3}),
        ("transformers.get_scheduler",
         {"name": "linear", "num_warmup_steps": 3, "num_training_steps": STEPS}),
    ],
)  # fmt: skip
def test_what_settings_name_scales_all_groups_and_is_resumed(
    scheduler: str, settings: dict[str, Any]
) -> None:
    """Fails if a plateau scheduler, or a function by path, cannot be used from a config."""
    if "." in scheduler:
        pytest.importorskip(scheduler.partition(".")[0], reason="its schedulers are compared")
    expected: list[Any] = []
    chosen = {"scheduler": scheduler, "settings": settings}
    fit(run(None, chosen, expected), STEPS)
    rates = [[rate for rate, _ in used] for used, *_ in expected]
    assert len({first for first, _ in rates}) > 1
    assert all(second == pytest.approx(first / 8) for first, second in rates)
    first, seen = cut(run(None, chosen, []), 7), list[Any]()
    bag = TensorBag()
    text = json.dumps(encode(first.state_dict()["plugins"], bag))
    second = run(None, chosen, seen)
    plugins = decode(json.loads(text), bag.tensors)
    second.load_state_dict({**copy.deepcopy(first.state_dict()), "plugins": plugins})  # type: ignore[typeddict-item]
    fit(second, STEPS)
    assert same(seen, expected[7:])


def test_a_training_metric_turns_a_plateau() -> None:
    make: Make = lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=1)  # noqa: E731
    engine = run(make, {"metric": "train/loss"}, seen := [], log_every=2)
    fit(engine, STEPS)
    assert [used[0][0] for used, *_ in seen][-1] < 0.4, "the loss falls, which is not up"


class RefusesPlugin(Plugin[PluginConfig]):
    """Marks every second step as refused."""

    @hookimpl
    def on_step(self, step: Step) -> None:
        step.refused = torch.tensor(float(step.number % 2))


def test_a_refused_step_counts_as_the_run_counts_it() -> None:
    seen: list[Any] = []
    make, turn, settings = SCHEDULERS["lambda"]
    fit(run(make, settings, seen, RefusesPlugin()), STEPS)
    assert [used for used, *_ in seen] == [used for used, *_ in by_hand(make, turn)]


def test_several_optimizers_have_a_scheduler_each() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    two = [
        torch.optim.SGD([p], lr=rate)
        for p, rate in zip(model.parameters(), (0.4, 0.2), strict=True)
    ]
    schedulers = [lr_scheduler.StepLR(two[0], 1, 0.5), lr_scheduler.StepLR(two[1], 1, 0.1)]
    engine = Engine(model, two, loss=loss_of, plugins=[LrTorchPlugin(schedulers)])
    fit(engine, 2)
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.1, 0.002])


@pytest.mark.parametrize(
    ("scheduler", "settings", "others", "words"),
    [
        (lambda o: lr_scheduler.StepLR(o, 1), {"metric": "val/f1"}, (), "uses no metric"),
        (lr_scheduler.StepLR(parts()[1], 1), {}, (), "drives another optimizer than the run's"),
        (7, {}, (), "takes a scheduler, a function.*got 7"),
        (lambda o: o.param_groups, {}, (), "expected a scheduler"),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), {"metric": "val/f1"}, (),
         r"lr_torch\.metric is 'val/f1', which this evaluation does not have; it has val/loss"),
        (lambda o: lr_scheduler.StepLR(o, 1), {},
         (SchedulePlugin(rules=[{"target": "optimizer.lr", "start": 1.0, "end": 0.1}]),),
         "another plugin sets them too"),
    ],
)  # fmt: skip
def test_a_scheduler_that_cannot_act_is_refused(
    scheduler: Any, settings: dict[str, Any], others: tuple[Plugin[Any], ...], words: str
) -> None:
    """Fails if a scheduler without effect is silently accepted."""
    with pytest.raises(ConfigError, match=words):
        fit(run(scheduler, settings, [], *others), 4)


def test_a_plateau_that_never_sees_its_metric_says_so() -> None:
    engine = run(lambda o: lr_scheduler.ReduceLROnPlateau(o), {}, [])
    with pytest.warns(RuntimeWarning, match="needs 'val/loss', which was never measured"):
        engine.fit(Epochs(), until=2)


def test_the_state_of_an_earlier_release_is_replayed() -> None:
    """Fails if a version-1 checkpoint, which only has the base rate, restarts the schedule."""
    name, settings = CASES[0]
    whole, first, second = (engine_of(name, settings) for _ in range(3))
    expected = rates(whole, 12)
    rates(first, 5)
    snapshot = copy.deepcopy(first.state_dict())
    snapshot["plugins"]["lr_torch"] = {"version": 1, "state": {"base": 0.5}}
    second.load_state_dict(snapshot)
    assert rates(second, 12) == expected[5:]
