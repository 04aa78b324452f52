"""How a run starts, is stopped, interrupted, finished and restored."""

from __future__ import annotations

import copy
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import (
    CheckpointError,
    ConfigError,
    Engine,
    Plugin,
    PluginConfig,
    PluginError,
    hookimpl,
)
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ema import EmaPlugin

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(8)]


def new(*plugins: Plugin[Any], optimizer: Any = None, **options: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    made = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss": lambda m, b: m(b).square().mean(), **options}
    return Engine(model, made, plugins=plugins, **options)


def test_stop_before_the_loop_ends_it_before_its_first_step() -> None:
    engine = new()
    assert not engine.stopping
    engine.stop("not now")
    result = engine.fit(BATCHES, until=3)
    assert (result.status, result.reason, result.step) == ("stopped", "not now", 0)
    assert engine.fit(BATCHES, until=3).status == "finished", "it held for one loop"


@pytest.mark.parametrize("hook", ["on_start", "on_batch", "on_step", "on_eval", "on_step_end"])
def test_stop_in_any_hook_ends_after_the_present_step(hook: str) -> None:
    def method(self: Any, engine: Engine) -> None:
        if engine.state.step in (0, 2):
            engine.stop(hook)

    method.__name__ = hook
    stopper = type("StopperPlugin", (Plugin,), {hook: hookimpl(method)})()
    result = new(stopper).fit(BATCHES, until=8, eval_data=BATCHES, eval_every=1)
    assert (result.status, result.reason) == ("stopped", hook)
    assert result.step == {"on_start": 0, "on_batch": 1}.get(hook, 2)


def test_a_loop_within_a_loop_is_refused_until_the_first_is_closed() -> None:
    engine = new()
    loop = engine.steps(BATCHES, until=4)
    next(loop)
    with pytest.raises(ConfigError, match=r"already has an open loop.*close\(\)"):
        engine.fit(BATCHES, until=4)
    assert engine.state.step == 1
    loop.close()
    assert engine.fit(BATCHES, until=4).step == 4

    class NestedPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_step(self, engine: Engine) -> None:
            engine.fit(BATCHES, until=9)

    with pytest.raises(ConfigError, match="already has an open loop"):
        new(NestedPlugin()).fit(BATCHES, until=2)


def test_a_plugin_object_belongs_to_one_engine() -> None:
    shared = EmaPlugin()
    first = new(shared)
    with pytest.raises(PluginError, match=r"'ema' already belongs to another engine.*EmaPlugin\("):
        new(shared)
    assert first.fit(BATCHES, until=2).step == 2


@pytest.mark.parametrize("given", [1.0, {"max_norm": 1.0}, "1"], ids=repr)
def test_the_first_positional_argument_of_a_plugin_is_a_config(given: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"takes its settings by name.*ClipPlugin\(max_norm=...\)"
    ):
        ClipPlugin(given)


def test_what_is_logged_is_one_number_without_a_graph() -> None:
    engine = new()
    with pytest.raises(ConfigError, match=r"'train/vector' is a tensor of shape \(3,\)"):
        engine.log("vector", torch.ones(3))
    value = (engine.model.weight.sum() * 2).reshape(1)
    engine.log("graph", value)
    pending = [v for entry in engine.meter._entries.values() for v, _ in entry.pending]
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in pending), "no graph is held"
    assert engine.meter.read(engine.ranks)["train/graph"] == value.item()


def test_an_embedded_fit_that_is_interrupted_ends_after_its_step_and_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real SIGINTs, with Python's own handler; the second one in a step interrupts at once."""

    class KillPlugin(Plugin[PluginConfig]):
        @hookimpl
        def after_backward(self, engine: Engine) -> None:
            for _ in range({3: 1, 5: 2}.get(engine.state.step, 0)):
                os.kill(os.getpid(), signal.SIGINT)

    engine = new(CheckpointPlugin(every=100), KillPlugin(), out=tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        result = engine.fit(BATCHES, until=9)
        assert (result.status, result.step) == ("interrupted", 4)
        assert result.reason == "interrupted (Ctrl-C)"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(
            KeyboardInterrupt, match="5 completed steps are kept, and fit continues"
        ):
            engine.fit(BATCHES, until=9)
        assert engine.state.step == 5
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert any("00000004" in path.name for path in (tmp_path / "checkpoints").iterdir())


def test_an_evaluation_that_is_interrupted_is_made_by_the_next_fit() -> None:
    """Fails if the stop button waits for a long evaluation, or the evaluation is lost."""
    evaluated: list[int] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if not engine.training:
            evaluated.append(engine.state.step)
            if len(evaluated) == 2:
                signal.raise_signal(signal.SIGINT)
        return model(batch).square().mean()

    engine = new(loss=loss)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = engine.fit(BATCHES, until=3, eval_data=BATCHES)
        assert (result.status, result.step, len(evaluated)) == ("interrupted", 3, 2)
        assert "val/loss" not in result.metrics
        result = engine.fit(BATCHES, until=3, eval_data=BATCHES)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.status, result.step, len(evaluated)) == ("finished", 3, 2 + len(BATCHES))
    assert result.history.points("val/loss")[0] == [3]


def test_a_handler_of_the_program_is_left_alone() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        for state in new().steps(BATCHES, until=2):
            if state.step == 1:
                signal.raise_signal(signal.SIGINT)
        new().fit(BATCHES, until=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT]


def test_fit_runs_outside_of_the_main_thread() -> None:
    engine = new()
    thread = threading.Thread(target=engine.fit, args=(BATCHES,), kwargs={"until": 3})
    thread.start()
    thread.join()
    assert engine.state.step == 3


@pytest.mark.parametrize("first", [True, False])
def test_an_error_at_the_end_reaches_the_caller_after_everybody_was_called(
    first: bool, tmp_path: Path
) -> None:
    """Fails if an error in one plugin's `on_finish` skips the others."""
    called: list[str] = []

    class NoticePlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_finish(self) -> None:
            called.append("notice")
            raise OSError("the mail server is down")

    class LaterPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_save(self) -> None:
            called.append("save")

        @hookimpl
        def on_finish(self) -> None:
            called.append("later")

        @hookimpl
        def on_close(self) -> None:
            called.append("closed")

    plugins: list[Plugin[Any]] = [LaterPlugin(), CheckpointPlugin(every=100)]
    plugins.insert(0 if first else 2, NoticePlugin())
    engine = new(*plugins, out=tmp_path)
    with pytest.raises(OSError, match="mail server") as caught:
        engine.fit(BATCHES, until=5)
    assert called == ["save", *(["notice", "later"] if first else ["later", "notice"]), "closed"]
    assert (tmp_path / "checkpoints" / "final").exists()
    assert any("'notice', on_finish" in note for note in caught.value.__notes__)


def test_generators_that_cannot_be_put_back_are_said() -> None:
    engine, again = new(), new()
    engine.fit(BATCHES, until=2)
    snapshot = copy.deepcopy(engine.state_dict())
    snapshot["random"]["devices"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    snapshot["random"]["accelerator"] = "xpu"
    with pytest.warns(RuntimeWarning, match="2 xpu devices were saved, and this process has"):
        again.load_state_dict(snapshot)
    assert again.state.step == 2


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)


class LatePlugin(Plugin[PluginConfig]):
    """Creates its state in `on_start`, which is too late."""

    @hookimpl
    def on_start(self) -> None:
        self.kept = 1

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ((), (two_groups,), "groups of"),
        ((LatePlugin(),), (LatePlugin(),), "'late' cannot load its saved state.*on_build"),
    ],
    ids=["optimizer", "plugin"],
)
def test_a_refused_load_leaves_the_engine_as_it_was(one: Any, other: Any, said: str) -> None:
    def engine(given: Any) -> Engine:
        plugins = [part for part in given if isinstance(part, Plugin)]
        optimizer = next((part for part in given if not isinstance(part, Plugin)), None)
        return new(*plugins, optimizer=optimizer)

    first, second = engine(one), engine(other)
    first.fit(BATCHES, until=3)
    before = copy.deepcopy(second.model.state_dict())
    drawn = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=said):
        second.load_state_dict(first.state_dict())
    assert all(torch.equal(before[n], v) for n, v in second.model.state_dict().items())
    assert second.state.step == 0
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_plugin_with_an_optimizer_of_its_own_is_resumed_from_on_build() -> None:
    class SecondPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_build(self, engine: Engine) -> None:
            self.optimizer = torch.optim.Adam([engine.model.bias])

        @hookimpl
        def on_step(self) -> None:
            self.optimizer.step()

        def state_dict(self) -> dict[str, Any]:
            return {"optimizer": self.optimizer.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.optimizer.load_state_dict(state["optimizer"])

    def engine() -> Engine:
        return new(SecondPlugin(), optimizer=lambda m: torch.optim.SGD([m.weight], lr=0.1))

    whole, first, again = engine(), engine(), engine()
    whole.fit(BATCHES, until=6)
    first.fit(BATCHES, until=3)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    again.fit(BATCHES, until=6)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


class SeePlugin(Plugin[PluginConfig]):
    """Measures gradients after clip, declared by plugin name, without a stage."""

    after = ("clip",)

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        grads = [p.grad.flatten() for p in engine.parameters() if p.grad is not None]
        self.norms.append(torch.cat(grads).norm().item())


def test_what_is_declared_to_come_after_a_plugin_comes_after_its_stage() -> None:
    see = SeePlugin()
    new(see, ClipPlugin(max_norm=0.01)).fit(BATCHES, until=3)
    assert max(see.norms) < 0.0101


def test_another_order_of_plugins_is_refused_when_a_run_is_to_be_exact(tmp_path: Path) -> None:
    def engine(*kinds: str) -> Engine:
        plugins = [type(f"{kind}Plugin", (Plugin,), {})() for kind in kinds]
        return new(*plugins, CheckpointPlugin(every=2), out=tmp_path)

    engine("A", "B").fit(BATCHES, until=4)
    with pytest.raises(CheckpointError, match="order differs: 'b' instead of 'a'"):
        engine("B", "A").resume()
    again = engine("A", "B")
    again.resume()
    assert again.state.step == 4
