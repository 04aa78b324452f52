"""The kit's checks catch what they are for, each by its name, and let a good plugin pass."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from nexus_core import Engine, Loss, LossConfig, Plugin, PluginConfig, Step, hookimpl
from nexus_core.testing import Outcome, PluginContract, run_contract


class ScaleConfig(PluginConfig):
    """Settings of the plugins of these tests."""

    strength: float = Field(0.5, ge=0, description="factor of the gradient")


class GoodPlugin(Plugin[ScaleConfig]):
    """Scales the gradient, more and more, and says by how much."""

    def __init__(self, config: ScaleConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.level = 1.0

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        self.level *= self.config.strength
        scale_gradients(engine, self.level)

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]


def scale_gradients(engine: Engine, factor: float | Tensor) -> None:
    for parameter in engine.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def outcomes(plugin: type[Plugin[Any]], *checks: str, **attributes: Any) -> list[Outcome]:
    contract = type("Contract", (PluginContract,), {"plugin": plugin, **attributes})
    return list(run_contract(contract, *checks))


def test_a_good_plugin_passes_every_check() -> None:
    """Breaks if a check raises a false alarm: authors would switch the kit off."""
    found = outcomes(GoodPlugin, configs=({"strength": 0.9},), off={"strength": 1.0})
    assert [outcome for outcome in found if outcome.status != "pass"] == []
    assert len({outcome.check for outcome in found}) == 20


def test_each_config_is_a_case_of_its_own() -> None:
    """Breaks if only the first of several configs is tried: the fault is in the second."""
    found = outcomes(GoodPlugin, "trains", configs=({}, {"strength": 1e30}))
    assert [(o.case, o.status) for o in found] == [
        ("config 0, accumulate 1", "pass"),
        ("config 0, accumulate 3", "pass"),
        ("config 1, accumulate 1", "FAIL"),
        ("config 1, accumulate 3", "FAIL"),
    ]


# -- planted faults: a plugin with one fault, the check that must find it, what it must say


class ReadsPlugin(GoodPlugin):
    """Looks at the gradient's length on the host, in each step."""

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.size = step.losses["tiny_next"].item()


class BranchesPlugin(GoodPlugin):
    """Decides by a tensor, which is a read too, in a helper."""

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.high = is_high(step.losses["tiny_next"])


def is_high(loss: Tensor) -> bool:
    return True if loss > 1 else False  # noqa: SIM210


class MasksPlugin(GoodPlugin):
    """Picks by a mask: the result's shape must be known on the host."""

    @hookimpl
    def on_batch(self, batch: dict[str, Tensor]) -> None:
        self.picked = batch["labels"][batch["labels"] > 0]


class ForgetfulPlugin(GoodPlugin):
    """Saves nothing of what its next steps hang on."""

    def state_dict(self) -> dict[str, Any]:
        return {}


class HalfLoadedPlugin(GoodPlugin):
    """Saves its state, and does not load it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


class ObjectStatePlugin(GoodPlugin):
    """Saves an object that no checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "since": Path("run")}


class OwnDicePlugin(GoodPlugin):
    """Draws from a generator of its own that begins anew on resuming."""

    def __init__(self, config: ScaleConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.dice = random.Random(0)

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        scale_gradients(engine, self.dice.random())


class DrawsAtStartPlugin(GoodPlugin):
    """Draws random numbers when a run starts, so a resumed one goes on with others."""

    @hookimpl
    def on_start(self) -> None:
        torch.rand(3)


class SavingCountsPlugin(GoodPlugin):
    """Changes its course whenever it is saved."""

    def state_dict(self) -> dict[str, Any]:
        self.level *= 0.9
        return {"level": self.level}


class SharedPlugin(GoodPlugin):
    """Keeps its state on the class, so that all engines of a process have one."""

    levels: ClassVar[dict[str, float]] = {}

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        self.levels["now"] = self.levels.get("now", 1.0) * 0.9
        scale_gradients(engine, self.levels["now"])


class ThreadPlugin(GoodPlugin):
    """Starts a thread, and leaves it."""

    @hookimpl
    def on_start(self) -> None:
        self.stop = threading.Event()
        LEFT_OPEN.append(self.stop)
        threading.Thread(target=self.stop.wait, name="left-behind", daemon=True).start()


class FilePlugin(GoodPlugin):
    """Opens a file, and leaves it open."""

    stream: IO[str]

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        assert engine.out is not None
        self.stream = (engine.out / "left-open.log").open("w")
        LEFT_OPEN.append(self.stream)


class ClosesOnFinishPlugin(FilePlugin):
    """Closes its file where a run ends well, and not where it fails."""

    @hookimpl
    def on_finish(self) -> None:
        self.stream.close()


class ClosesUnopenedPlugin(FilePlugin):
    """Fails in on_close where the run failed before it had opened anything."""

    @hookimpl
    def on_close(self) -> None:
        self.stream.close()


class SignalPlugin(GoodPlugin):
    """Takes a signal, and does not give it back."""

    @hookimpl
    def on_start(self) -> None:
        signal.signal(signal.SIGUSR2, lambda *_: None)


class ModuleHookPlugin(GoodPlugin):
    """Hooks into a module for good."""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        engine.model.register_forward_hook(lambda module, inputs, output: output * 0.5)


class PatchPlugin(GoodPlugin):
    """Replaces a method of the model for good."""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        forward = engine.model.forward
        engine.model.forward = lambda input_ids: forward(input_ids) * 0.5  # type: ignore[method-assign]


class PrecisionPlugin(GoodPlugin):
    """Sets how exact torch's products are, for the whole process."""

    @hookimpl
    def on_start(self) -> None:
        torch.set_float32_matmul_precision("medium")


class OpenConfig(PluginConfig):
    """Takes any key."""

    model_config = ConfigDict(extra="allow")


class OpenConfigPlugin(Plugin[OpenConfig]):
    """Takes any key."""


class UndescribedConfig(PluginConfig):
    """Says nothing of its field."""

    power: float = 1.0


class UndescribedPlugin(Plugin[UndescribedConfig]):
    """Has a field without a description."""


class MisspeltPlugin(GoodPlugin):
    """Means on_step."""

    def on_stepp(self) -> None: ...


class MismarkedPlugin(GoodPlugin):
    """Means on_eval."""

    @hookimpl
    def on_evall(self) -> None: ...


class WrongArgumentPlugin(GoodPlugin):
    """Asks a hook for what it does not have."""

    @hookimpl
    def on_step(self, engin: Engine) -> None: ...


class CirclePlugin(GoodPlugin):
    """Wants to be after clip and before guard; but clip comes after guard."""

    after = ("clip",)
    before = ("guard",)


class LatePlugin(GoodPlugin):
    """Says that it comes before clip, and marks the hook as the last."""

    before = ("clip",)

    @hookimpl(trylast=True)
    def after_backward(self, engine: Engine) -> None: ...


class StrangerPlugin(GoodPlugin):
    """Misspells the plugin that it comes before."""

    before = ("checkpiont",)


class TooLatePlugin(GoodPlugin):
    """Clips when the update has been made."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        scale_gradients(engine, 0.5)


class EachMicroBatchPlugin(Plugin[ScaleConfig]):
    """Scales what is there of the gradient with each micro-batch."""

    @hookimpl(wrapper=True)
    def backward(self, engine: Engine) -> Generator[None, bool, bool]:
        done = yield
        scale_gradients(engine, self.config.strength)
        return done


class MeanPlugin(Loss[LossConfig]):
    """Gives the mean of a micro-batch as if it were the sum."""

    def units(self, batch: dict[str, Tensor]) -> float:
        return float(len(batch["labels"]))

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return output.square().mean()


class NotOffPlugin(GoodPlugin):
    """Says that it is off, and is not."""


class GrowingPlugin(GoodPlugin):
    """Goes through all losses so far, in each step."""

    def __init__(self, config: ScaleConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.losses: list[Tensor] = []

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.losses.append(step.losses["tiny_next"])
        self.mean = sum(loss * 0.5 for loss in self.losses)


class ManyOperationsPlugin(GoodPlugin):
    """Takes a thousand operations for what takes one."""

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.total = sum(step.losses["tiny_next"] for _ in range(1000))


class SlowPlugin(GoodPlugin):
    """Holds each step up for 60 ms."""

    @hookimpl
    def on_step(self) -> None:
        until = time.perf_counter() + 0.06
        while time.perf_counter() < until:
            pass


class ExplodingPlugin(GoodPlugin):
    """Makes the weights infinite."""

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        scale_gradients(engine, float("inf"))


LEFT_OPEN: list[Any] = []

FAULTS = [
    (ReadsPlugin, "device_is_not_waited_for", r"Tensor.item at test_testing.py:\d+ in on_step"),
    (BranchesPlugin, "device_is_not_waited_for", r"__bool__ .* in is_high: return True if loss"),
    (MasksPlugin, "device_is_not_waited_for", r"indexing by a mask .* in on_batch"),
    (ForgetfulPlugin, "resume_is_bit_equal", r"resumed at step 1.*model\..*numbers differ"),
    (OwnDicePlugin, "resume_is_bit_equal", r"model\..*numbers differ"),
    (DrawsAtStartPlugin, "resume_is_bit_equal", r"differ"),
    (HalfLoadedPlugin, "state_round_trips", r"level: 0.015625, and 1.0"),
    (ObjectStatePlugin, "state_round_trips", r"object_state.state_dict\(\).since: PosixPath"),
    (SavingCountsPlugin, "saving_changes_nothing", r"reading the state .* changes the run"),
    (SharedPlugin, "engines_share_no_state", r"beside another engine"),
    (ThreadPlugin, "leaks_nothing", r"thread 'left-behind'"),
    (FilePlugin, "leaks_nothing", r"left-open.log"),
    (ClosesOnFinishPlugin, "leaks_nothing_after_a_failure", r"left-open.log"),
    (ClosesUnopenedPlugin, "leaks_nothing_after_a_failure", r"in on_start, it fails too"),
    (SignalPlugin, "leaks_nothing", r"handler of SIGUSR2"),
    (ModuleHookPlugin, "leaves_no_trace", r"_forward_hooks of the model was 0 and is 1"),
    (PatchPlugin, "leaves_no_trace", r"forward on the model is new"),
    (PrecisionPlugin, "leaves_no_trace", r"matmul precision was 'highest' and is 'medium'"),
    (OpenConfigPlugin, "config_is_strict", r"OpenConfig must have extra='forbid'"),
    (UndescribedPlugin, "config_is_described", r"UndescribedConfig.power"),
    (MisspeltPlugin, "hooks_are_known", r"'on_stepp' is never called.*'on_step'"),
    (MismarkedPlugin, "hooks_are_known", r"on_evall is marked @hookimpl.*Did you mean 'on_eval'"),
    (WrongArgumentPlugin, "hooks_are_known", r"engin"),
    (CirclePlugin, "order_holds", r"circle"),
    (LatePlugin, "order_holds", r"'clip' is called before 'late' in after_backward"),
    (StrangerPlugin, "order_holds", r"'checkpiont', which is not installed; is it.*checkpoint"),
    (TooLatePlugin, "gradient_is_left_alone_after_the_update", r"in step 1, gradients were chan"),
    (EachMicroBatchPlugin, "split_of_a_step_is_free", r"in three micro-batches"),
    (MeanPlugin, "split_of_a_step_is_free", r"in three micro-batches"),
    (NotOffPlugin, "off_is_absent", r"training is not as without"),
    (GrowingPlugin, "operations_are_within_budget", r"more operations than the one before.*mul"),
    (ManyOperationsPlugin, "operations_are_within_budget", r"aten.add.Tensor 1000x"),
    (SlowPlugin, "time_is_within_budget", r"quickest step takes \d+"),
    (ExplodingPlugin, "trains", r"parameters are not finite"),
]


class HostOnlyPlugin(GoodPlugin):
    """Reads where it costs nothing: on the host, by either way of asking, and for the log."""

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        loss = step.losses["tiny_next"]
        if loss.is_cpu:
            self.seen = loss.item()
        self.look(engine)

    def look(self, engine: Engine, step: Step) -> None:
        if engine.device.type == "cpu":
            self.seen = float(step.losses["tiny_size"])

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        return {"seen": self.seen}


class StopsPlugin(GoodPlugin):
    """Ends each run in its second step."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        if engine.state.step == 2:
            engine.stop("it is late")


def test_a_read_on_the_host_alone_is_no_fault_where_it_is_declared() -> None:
    """Breaks if authors must give up a free look, or one that is not declared is passed over."""
    check = "device_is_not_waited_for"
    [found] = outcomes(HostOnlyPlugin, check)
    assert re.search(r"5 of 5 steps: Tensor.__float__ at \S+ in look: [^;]*$", found.reason)
    assert [o.status for o in outcomes(HostOnlyPlugin, check, reads_on_cpu=("look",))] == ["pass"]


def test_a_run_that_ends_too_soon_is_told() -> None:
    """Breaks if checks pass, or fail obscurely, on runs that were too short to show anything."""
    for outcome in outcomes(StopsPlugin, "trains", "resume_is_bit_equal", "time_is_within_budget"):
        assert "the run ended at step 2 (it is late)" in outcome.reason


@pytest.fixture
def cleaned() -> Iterator[None]:
    """Gives back what the planted faults leave behind."""
    handler, precision = signal.getsignal(signal.SIGUSR2), torch.get_float32_matmul_precision()
    yield
    signal.signal(signal.SIGUSR2, handler)
    torch.set_float32_matmul_precision(precision)
    for left in LEFT_OPEN:
        left.set() if isinstance(left, threading.Event) else left.close()
    LEFT_OPEN.clear()
    SharedPlugin.levels.clear()


@pytest.mark.usefixtures("cleaned")
@pytest.mark.parametrize(
    ("plugin", "check", "message"), FAULTS, ids=[plugin.name for plugin, *_ in FAULTS]
)
def test_a_planted_fault_is_caught_by_its_check(
    plugin: type[Plugin[Any]], check: str, message: str
) -> None:
    """Breaks if the check no longer sees the fault, or does not say where it is."""
    off: dict[str, Any] = {"off": {}} if check == "off_is_absent" else {}
    failed = [outcome for outcome in outcomes(plugin, check, **off) if outcome.status == "FAIL"]
    assert failed, f"{check} passes"
    assert re.search(message, failed[0].reason, re.DOTALL), failed[0].reason
