"""The guard: non-finite numbers never reach the weights, and bad steps can be replayed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from nexus_core import CheckpointError, Engine, Plugin, PluginConfig, RunError, Step, hookimpl
from nexus_core.cli.run import main as nexus_run
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.guard import GuardPlugin, record
from nexus_plugins.guard.spikes import Spikes
from tiny import RecorderPlugin

REFUSED = "skipped the update of step"


class PoisonPlugin(Plugin[PluginConfig]):
    """Corrupts chosen steps: the loss, the gradient, or only the size of the loss."""

    before = ("guard",)

    def __init__(self, *steps: int, kind: str = "gradient", value: float = float("nan")) -> None:
        super().__init__()
        self.steps, self.kind, self.value = steps, kind, value

    @hookimpl
    def on_batch(self, engine: Engine, batch: dict[str, Tensor]) -> None:
        if self.kind == "batch" and engine.state.step + 1 in self.steps:
            batch.update(x=batch["x"] * self.value, y=batch["y"] * self.value)

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        if self.kind == "gradient" and engine.state.step + 1 in self.steps:
            gradient = next(engine.model.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[3] = self.value


class FollowerPlugin(Plugin[PluginConfig]):
    """Averages the weights, as ema does, except in refused steps."""

    def __init__(self) -> None:
        super().__init__()
        self.average: list[Tensor] = []

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        weights = [p.detach().clone() for p in engine.model.parameters()]
        weight = 0.1 * (1 - float(step.refused))
        before = self.average or weights
        self.average = [a.lerp(w, weight) for a, w in zip(before, weights, strict=True)]


def engine_of(*plugins: Plugin[Any], optimizer: str = "adamw", out: Path | None = None) -> Engine:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)]
    model = Rows(nn.Sequential(*layers))
    parameters = list(model.parameters())
    made: dict[str, Any] = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        "fused": lambda: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
    }
    return Engine(
        model, made[optimizer](), loss=loss, plugins=plugins, seed=1, log_every=5, out=out
    )


class Rows(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(10, 8, 4, generator=generator)
    return [
        {"x": x[i], "y": x[i].sum(1, keepdim=True), "sample_ids": torch.arange(8)}
        for i in range(10)
    ]


def state(engine: Engine) -> list[Tensor]:
    moments = engine.optimizer.state_dict()["state"]
    tensors = [p.detach().clone() for p in engine.model.parameters()]
    return tensors + [
        v.clone() for s in moments.values() for v in s.values() if isinstance(v, Tensor)
    ]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
@pytest.mark.parametrize(
    ("optimizer", "device_path"),
    [("adamw", False), ("sgd", False), ("fused", False), ("fused", True)],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_refused_step_leaves_everything_as_it_was(
    value: float, optimizer: str, device_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one bad number changes a weight, a moment, a step count or an average."""
    follower = FollowerPlugin()
    engine = engine_of(
        PoisonPlugin(4, 5, value=value), GuardPlugin(), ClipPlugin(), follower, optimizer=optimizer
    )
    if device_path:
        verdicts_stay_on_the_device(monkeypatch)
    states, averages = [], []
    for _ in engine.steps(data(), until=6):
        states.append(state(engine))
        averages.append(follower.average)
    assert equal(states[2], states[3])
    assert equal(states[2], states[4])
    assert equal(averages[2], averages[4])
    assert not equal(states[4], states[5])
    assert all(tensor.isfinite().all() for tensor in states[5])


def verdicts_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the code path of CUDA: nothing is read until a log is due."""
    monkeypatch.setattr("nexus_plugins.guard.plugin.WAITED_FOR", ())


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
def test_without_the_guard_the_same_step_spoils_the_weights() -> None:
    """Fails if the tests above would pass without the guard."""
    engine = engine_of(PoisonPlugin(4))
    engine.fit(data(), until=6)
    assert not all(tensor.isfinite().all() for tensor in state(engine))


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_is_refused_even_where_its_gradient_looks_good(value: float) -> None:
    """Fails if only gradients are checked."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)

    batches = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(
        model, optimizer, loss=lambda m, b: loss(m, b) + b["bad"], plugins=[GuardPlugin()]
    )
    spoiled = [
        {**batch, "bad": torch.tensor(value if i == 2 else 0.0)} for i, batch in enumerate(batches)
    ]
    before = [state(engine) for _ in engine.steps(spoiled, until=4)]
    assert equal(before[1], before[2])
    assert not equal(before[2], before[3])


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
def test_good_steps_are_not_touched() -> None:
    """Fails if the guard changes a healthy run, or rejects very large gradients."""
    plain, guarded = engine_of(), engine_of(GuardPlugin(spike_threshold=1e9))
    huge = [{**batch, "y": batch["y"] * 1e15} for batch in data()]
    plain.fit(huge, until=10)
    guarded.fit(huge, until=10)
    assert equal(state(plain), state(guarded))


@pytest.mark.parametrize("device_path", [False, True], ids=["host", "device"])
def test_refused_steps_are_counted_and_logged(
    device_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if skipped steps go unnoticed."""
    if device_path:
        verdicts_stay_on_the_device(monkeypatch)
    record = RecorderPlugin()
    engine = engine_of(PoisonPlugin(2, 3, 8), GuardPlugin(), record, optimizer="fused")
    with pytest.warns(RuntimeWarning, match=REFUSED):
        engine.fit(data(), until=10)
    assert [line["guard/skipped_steps"] for _, line in record.lines] == [2.0, 3.0]


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
@pytest.mark.parametrize(
    ("settings", "bad", "stop"),
    [({"policy": "stop"}, (3,), 3), ({"max_consecutive": 3}, (2, 4, 5, 7, 8, 9, 10), 9)],
)
def test_a_stop_saves_first_and_then_says_why(
    settings: dict[str, Any], bad: tuple[int, ...], stop: int, tmp_path: Path
) -> None:
    """Fails if stopping for bad numbers loses the good weights, or looks like success."""
    guard = GuardPlugin(**settings)
    engine = engine_of(PoisonPlugin(*bad), guard, CheckpointPlugin(every=100), out=tmp_path)
    with pytest.raises(RunError, match=f"skipped the update of step {stop}"):
        engine.fit(data(), until=20)
    assert engine.state.step == stop
    again = engine_of(
        PoisonPlugin(), GuardPlugin(**settings), CheckpointPlugin(every=100), out=tmp_path
    )
    again.resume()
    assert again.state.step == stop
    assert equal(state(again), state(engine))
    again.fit(data(), until=stop + 2)


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
def test_a_rollback_restores_the_last_save_and_goes_on_with_new_data(tmp_path: Path) -> None:
    """Fails if weights, moments or a plugin's state are not restored, or data is repeated."""
    follower = StatefulPlugin()
    guard = GuardPlugin(policy="rollback")
    engine = engine_of(PoisonPlugin(8), guard, CheckpointPlugin(every=5), follower, out=tmp_path)
    states, seen = [], []
    for counters in engine.steps(data(), until=10):
        states.append(state(engine))
        seen.append((counters.step, counters.batch or 10, follower.count))
    assert equal(states[7], states[4])
    assert not equal(states[7], states[6])
    assert [step for step, _, _ in seen] == list(range(1, 11))
    assert [batch for _, batch, _ in seen] == list(range(1, 11))
    assert [count for _, _, count in seen] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7]
    assert engine.metrics["guard/rollbacks"] == 1.0


class StatefulPlugin(Plugin[PluginConfig]):
    """Counts steps, and is restored on a rollback."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @hookimpl
    def on_step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_with_refused_steps_resumes_to_the_same_bits(policy: str, tmp_path: Path) -> None:
    """Fails if the guard's counts, or its rollback target, are lost in a kill."""

    def made(out: Path) -> Engine:
        guard = GuardPlugin(policy=policy, spike_threshold=3.0, spike_window=8)
        return engine_of(PoisonPlugin(3, 8, 9, 14), guard, CheckpointPlugin(every=5), out=out)

    whole = made(tmp_path / "whole")
    whole.fit(data(), until=20)
    for stop in (7, 9, 12, 20):
        engine = made(tmp_path / "cut")
        engine.resume()
        for counters in engine.steps(data(), until=20):
            if counters.step == stop:
                break
    assert equal(state(whole), state(engine))
    assert (
        whole.plugins["guard"].state_dict()["skipped"]
        == engine.plugins["guard"].state_dict()["skipped"]
    )


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
def test_rolling_back_in_vain_ends() -> None:
    """Fails if a run rolls back to the same save forever."""
    guard = GuardPlugin(policy="rollback", max_consecutive=3)
    engine = engine_of(PoisonPlugin(*range(4, 100, 2)), guard, SavePlugin(2))
    with pytest.raises(RunError, match="3 rollbacks did not help"):
        engine.fit(data(), until=100)


class SavePlugin(Plugin[PluginConfig]):
    """Takes a snapshot after one step, as a plugin that writes checkpoints does."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        if engine.state.step == self.step:
            engine.state_dict()


class NotesPlugin(Plugin[PluginConfig]):
    """Records the notes of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    @hookimpl
    def on_note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("device_path", [False, True], ids=["host", "device"])
def test_a_rollback_says_where_it_goes(device_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rollback does not report how many steps are lost."""
    if device_path:
        verdicts_stay_on_the_device(monkeypatch)
    notes = NotesPlugin()
    parts: list[Plugin[Any]] = [
        PoisonPlugin(8),
        GuardPlugin(policy="rollback"),
        SavePlugin(6),
        notes,
    ]
    with pytest.warns(RuntimeWarning, match="rolling back to the save of step 6"):
        engine_of(*parts, optimizer="fused").fit(data(), until=10)
    assert len(notes.texts) == 1
    assert "rolling back to the save of step 6" in notes.texts[0]


@pytest.mark.parametrize("device_path", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("begin", ["new", "loaded"])
def test_without_a_save_a_rollback_keeps_the_progress(
    begin: str, device_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a bad step before the first save discards all progress."""
    if device_path:
        verdicts_stay_on_the_device(monkeypatch)
    engine = engine_of(PoisonPlugin(8), GuardPlugin(policy="rollback"), optimizer="fused")
    if begin == "loaded":  # as `--resume auto` does without a checkpoint
        engine.load_state_dict(engine.state_dict())
    states: list[list[Tensor]] = []
    engine_steps = engine.steps(data(), until=10)
    with pytest.warns(RuntimeWarning, match="there is no save to roll back to yet"):
        states.extend(state(engine) for _ in engine_steps)
    assert equal(states[6], states[7])
    assert not equal(states[7], states[9])
    assert engine.metrics["guard/rollbacks"] == 0.0


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
@pytest.mark.parametrize("guard_first", [True, False])
def test_averages_go_back_with_the_weights(guard_first: bool) -> None:
    """Fails if the order of plugin names affects what a rollback restores."""
    average, guard = EmaPlugin(decay=0.9), GuardPlugin(policy="rollback")
    pair: list[Plugin[Any]] = [guard, average] if guard_first else [average, guard]
    engine = engine_of(PoisonPlugin(8), *pair, SavePlugin(5))
    seen = []
    for _ in engine.steps(data(), until=8):
        saved = average.state_dict()["average"]
        assert isinstance(saved, dict)
        seen.append([value.clone() for value in saved.values() if isinstance(value, Tensor)])
    assert seen[4]
    assert equal(seen[7], seen[4])
    assert not equal(seen[6], seen[4])


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
def test_a_log_right_after_a_rollback_shows_what_it_always_does() -> None:
    """Fails if a rollback loses a metric's `finish` function or its sums."""

    class RootPlugin(Plugin[PluginConfig]):
        """Logs the root of the mean step number."""

        @hookimpl
        def on_batch(self, engine: Engine) -> None:
            engine.log("root", float(engine.state.step + 1), finish=math.sqrt)

    engine = engine_of(PoisonPlugin(5), GuardPlugin(policy="rollback"), SavePlugin(2), RootPlugin())
    engine.fit(data(), until=5)
    assert engine.metrics["guard/rollbacks"] == 1.0
    assert engine.metrics["train/root"] == math.sqrt(3)


class CountingSgd(torch.optim.SGD):
    """Counts its steps in its groups, even without gradients, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_refused_step_is_no_step_of_an_optimizer_that_counts(scaled: bool) -> None:
    """Fails if a refused step advances counters that an optimizer keeps in its groups."""
    model = Rows(nn.Linear(4, 1))
    optimizer = CountingSgd(model.parameters(), lr=0.01)
    spike = PoisonPlugin(12, kind="batch", value=20.0)
    plugins: list[Plugin[Any]] = [spike, GuardPlugin(spike_threshold=6.0, spike_window=8)]
    plugins += [AmpPlugin(dtype="fp16", initial_scale=1.0)] if scaled else []
    engine = Engine(model, optimizer, loss=loss, plugins=plugins)
    counts = []
    for _ in engine.steps(data(), until=13):
        counts.append(engine.optimizer.param_groups[0]["k"])
    assert counts == [*range(1, 12), 11, 12]


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
@pytest.mark.parametrize("bad", ["spike", "nan"])
def test_a_gradient_scaler_does_not_let_a_refused_step_pass(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the scaler's flag replaces the guard's on devices without reads."""
    verdicts_stay_on_the_device(monkeypatch)
    spike = PoisonPlugin(12, kind="batch", value=1000.0 if bad == "spike" else float("nan"))
    guard = GuardPlugin(spike_threshold=6.0, spike_window=8)
    amp = AmpPlugin(dtype="fp16", initial_scale=2.0)
    engine = engine_of(spike, guard, amp, optimizer="fused")
    states = [state(engine) for _ in engine.steps(data(), until=13)]
    assert equal(states[10], states[11])
    assert not equal(states[11], states[12])
    assert engine.metrics["guard/skipped_steps"] == 1.0
    assert engine.metrics["amp/skipped_steps"] == float(bad == "nan"), "a spike is no overflow"


@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=20, max_size=40), threshold=st.floats(2, 6)
)
def test_spikes_are_those_of_the_median_rule(values: list[float], threshold: float) -> None:
    """Fails if the running median, its deviation, or the window differ from the rule."""
    spikes = Spikes(threshold, 9)
    kept: list[float] = []
    for value in values:
        recent = kept[-9:]
        expected = False
        if len(kept) >= 9:
            median = statistics.median(recent)
            spread = 1.4826 * statistics.median(abs(x - median) for x in recent)
            limit = median + threshold * max(spread, 1e-6)
            expected = value > limit
            if abs(value - limit) < 1e-4:
                return  # too close to call in float32
        assert bool(spikes.judge(torch.tensor(value))) == expected
        if not expected:
            kept.append(value)


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
def test_a_spike_is_refused_only_where_asked_for() -> None:
    """Fails if spike detection is on by default, or off when asked for."""
    for settings, refused in (({}, 0.0), ({"spike_threshold": 6.0, "spike_window": 8}, 1.0)):
        poison = PoisonPlugin(15, kind="batch", value=100.0)
        engine = engine_of(poison, GuardPlugin(**settings))  # type: ignore[arg-type]
        engine.fit(data(), until=20)
        assert engine.metrics["guard/skipped_steps"] == refused


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_a_record_is_written_and_names_the_culprit(optimizer: str, tmp_path: Path) -> None:
    """Fails if a bad step cannot be replayed, or the wrong module is blamed."""
    engine = engine_of(
        PoisonPlugin(3, kind="batch"), GuardPlugin(), optimizer=optimizer, out=tmp_path
    )
    with pytest.warns(RuntimeWarning, match=r"nexus-run replay .*step-00000003"):
        engine.fit(data(), until=5)
    record = tmp_path / "guard" / "step-00000003"
    facts = json.loads((record / "record.json").read_text())
    assert facts["step"] == 3
    assert facts["losses"] == {"loss": "nan"}
    assert facts["sample_ids"] == [list(range(8))]
    assert facts["gradient_norms"] == {"layers.0": "nan", "layers.2": "nan"}
    fresh = engine_of(GuardPlugin(), optimizer=optimizer)
    report = fresh.plugins["guard"].replay(fresh, record)  # type: ignore[attr-defined]
    assert "first bad output: layers.0 (Linear)" in report
    assert "loss loss: nan" in report


class Divides(nn.Module):
    """Finite in the forward pass, but not in the backward pass: the root of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.root, self.last = nn.Linear(4, 4), Root(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.root(self.first(x)))


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 0).sqrt()


def test_a_gradient_that_breaks_on_the_way_back_is_located(tmp_path: Path) -> None:
    """Fails if a step with a valid forward pass is reported as valid."""

    def made(out: Path | None) -> Engine:
        torch.manual_seed(0)
        model = Divides()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Engine(model, optimizer, loss=loss, plugins=[GuardPlugin(records=1)], out=out)

    with pytest.warns(RuntimeWarning, match="the gradient is not finite"):
        made(tmp_path).fit(data(), until=2)
    records = list((tmp_path / "guard").iterdir())
    assert len(records) == 1
    again = made(None)
    report = again.plugins["guard"].replay(again, records[0])  # type: ignore[attr-defined]
    assert "first bad gradient: at the output of first (Linear)" in report
    assert "first bad output" not in report


def test_the_replayed_step_has_the_random_numbers_of_the_first(tmp_path: Path) -> None:
    """Fails if dropout differs in the replay, so that the fault does not recur."""

    def made(out: Path | None) -> Engine:
        torch.manual_seed(0)
        model = Rows(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Explodes(), nn.Linear(4, 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return Engine(model, optimizer, loss=loss, plugins=[GuardPlugin()], out=out, seed=3)

    with pytest.warns(RuntimeWarning, match=REFUSED):
        made(tmp_path).fit(data(), until=30)
    record = min((tmp_path / "guard").iterdir())
    again = made(None)
    assert "first bad output: layers.2 (Explodes)" in again.plugins["guard"].replay(again, record)  # type: ignore[attr-defined]


def test_a_turn_of_several_optimizers_is_refused_and_replayed_as_that_turn(tmp_path: Path) -> None:
    """Fails if a later turn is not refused, or the replay uses another turn's terms."""

    class TurnsPlugin(Plugin[PluginConfig]):
        @hookimpl
        def take_turns(self, step: Step) -> list[str]:
            return ["first", "second"]

        @hookimpl
        def loss_units(self, step: Step) -> dict[str, float]:
            return {str(step.turn): 1.0}

        @hookimpl
        def loss_terms(self, engine: Engine, output: Tensor, step: Step) -> dict[str, Tensor]:
            broken = step.turn == "second" and step.number == 3
            return {str(step.turn): output.sum() * (math.nan if broken else 1.0)}

    def made(out: Path | None) -> Engine:
        torch.manual_seed(0)
        nets = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 1)])
        optimizers = {
            name: torch.optim.SGD(net.parameters(), lr=0.01)
            for name, net in zip(("first", "second"), nets, strict=True)
        }
        model = nn.Sequential(*nets)
        return Engine(model, optimizers, plugins=[TurnsPlugin(), GuardPlugin()], out=out)

    engine = made(tmp_path)
    with pytest.warns(RuntimeWarning, match="skipped the update of step 3"):
        engine.fit([torch.ones(4, 2)] * 4, until=4)
    assert all(parameter.isfinite().all() for parameter in engine.model.parameters())
    assert engine.plugins["guard"].state_dict()["skipped"] == 1
    again = made(None)
    report = again.plugins["guard"].replay(again, tmp_path / "guard/step-00000003")  # type: ignore[attr-defined]
    assert "loss second: nan  <- not finite" in report
    assert "loss first" not in report


class Explodes(nn.Module):
    """Non-finite for one particular number of dropped values, which occurs occasionally."""

    def forward(self, x: Tensor) -> Tensor:
        return x / ((x == 0).sum() != 12).float()


@pytest.mark.filterwarnings(f"ignore:{REFUSED}")
def test_a_record_whose_write_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a full disk leaves a partial record, which replay cannot read but which counts."""

    def full(model: nn.Module, filename: str) -> None:
        save_model(model, filename)
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "save_model", full)
    engine = engine_of(PoisonPlugin(3, 5), GuardPlugin(records=1), out=tmp_path)
    with pytest.warns(RuntimeWarning, match="could not be dumped.*No space left"):
        engine.fit(data(), until=6)
    assert [path.name for path in (tmp_path / "guard").iterdir()] == ["step-00000005"]
    replayed = engine_of(GuardPlugin())
    report = replayed.plugins["guard"].replay(replayed, tmp_path / "guard" / "step-00000005")  # type: ignore[attr-defined]
    assert report.startswith("step 5:")


def test_a_record_that_is_none_is_said(tmp_path: Path) -> None:
    """Fails if a mistyped record ends in a traceback."""
    engine = engine_of(GuardPlugin())
    with pytest.raises(CheckpointError, match="cannot replay"):
        engine.plugins["guard"].replay(engine, tmp_path)  # type: ignore[attr-defined]


def recorded(out: Path) -> Path:
    """A record of a refused step."""
    engine = engine_of(PoisonPlugin(3, kind="batch"), GuardPlugin(), out=out)
    with pytest.warns(RuntimeWarning, match=REFUSED):
        engine.fit(data(), until=4)
    return out / "guard" / "step-00000003"


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: edited(folder, lambda facts: facts.pop(name))


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((folder / "record.json").read_text())
    edit(facts)
    (folder / "record.json").write_text(json.dumps(facts))


def linked(name: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return link


def retold(name: str, tensor: Tensor) -> Callable[[Path], object]:
    def put(folder: Path) -> None:
        path = folder / "step.safetensors"
        tensors = {n: t.clone() for n, t in load_file(path).items()}
        save_file({**tensors, name: tensor}, path)

    return put


@pytest.mark.parametrize(
    "forge",
    [
        *(linked(n) for n in ("record.json", "step.safetensors", "model.safetensors")),
        *(without(n) for n in ("step", "verdict", "batches", "python", "numpy")),
        lambda f: edited(f, lambda facts: facts.update(batches=[1])),
        lambda f: edited(f, lambda facts: facts.update(batches={"0": 5})),
        lambda f: edited(f, lambda facts: facts.update(step="x")),
        lambda f: edited(f, lambda facts: facts["python"].__setitem__(1, [1])),
        lambda f: edited(f, lambda facts: facts["numpy"].__setitem__(2, 10**6)),
        lambda f: (f / "record.json").write_text("[" * 100_000),
        lambda f: (f / "record.json").write_text("[]"),
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 100),
        retold("torch", torch.zeros(5056, dtype=torch.uint8)),
        retold("batch.0.x", torch.zeros(3, 99)),
        retold("batch.0.x", torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_a_forged_record_is_only_ever_a_checkpoint_error(
    forge: Callable[[Path], object], tmp_path: Path
) -> None:
    """Fails if an untrusted record ends in a traceback, or a link in it is followed."""
    record = recorded(tmp_path)
    forge(record)
    engine = engine_of(GuardPlugin())
    with pytest.raises(CheckpointError, match=r"cannot replay"):
        engine.plugins["guard"].replay(engine, record)  # type: ignore[attr-defined]


def test_replay_writes_nowhere_that_a_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an untrusted run folder makes `replay` write outside it, or crash."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(300)))
    plugins: dict[str, Any] = {
        "data_text": {"train": "corpus.txt", "seq_len": 32, "batch_size": 4, "cache_dir": "cache"},
        "model_nexus": {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16},
        "loss_lm": {}, "optim_adamw": {"lr": 0.1}, "jsonl": {},
        "guard": {"spike_threshold": 1e-6, "spike_window": 8, "records": 1},
    }  # fmt: skip
    Path("tiny.yaml").write_text(yaml.safe_dump({"until": "30 steps", "plugins": plugins}))
    ran = CliRunner().invoke(nexus_run, ["tiny.yaml", "--out", "run", "--quiet"])
    assert "nexus-run replay" in ran.output, ran.output
    (record,) = Path("run/guard").iterdir()
    config = Path("run/config.yaml")
    settings = yaml.safe_load(config.read_text())
    settings["plugins"]["jsonl"]["file"] = str(tmp_path / "outside" / "metrics.jsonl")
    settings["plugins"]["data_text"]["cache_dir"] = "~/outside/cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    config.write_text(yaml.safe_dump(settings))
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    done = CliRunner().invoke(nexus_run, ["replay", str(record)])
    assert (done.exit_code, "loss lm" in done.output) == (0, True), done.output
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
    settings["plugins"]["data_text"]["cache_dir"] = "here"  # in the current folder, not in the run
    config.write_text(yaml.safe_dump(settings))
    assert CliRunner().invoke(nexus_run, ["replay", str(record)]).exit_code == 0
    assert not Path("here").exists()
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 20)
    )
    for text, fault in (
        (bomb, "more than 40,000 values"),
        ("a: " + "x" * (2 << 20), "exceed the limit"),
    ):
        config.write_text(text)
        done = CliRunner().invoke(nexus_run, ["replay", str(record)])
        assert (done.exit_code, fault in done.output) == (2, True), done.output
    config.rename("elsewhere.yaml")
    config.symlink_to(tmp_path / "elsewhere.yaml")
    assert CliRunner().invoke(nexus_run, ["replay", str(record)]).exit_code == 2
