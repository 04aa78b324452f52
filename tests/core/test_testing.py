"""The kit's checks find the faults they are for, and let a good plugin pass."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections import Counter, UserDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from nexus_core import Engine, Loss, LossConfig, Plugin, PluginConfig, Step, hookimpl
from nexus_core.testing import Outcome, PluginContract, run_contract
from nexus_core.testing.states import stored


class ScaleConfig(PluginConfig):
    """Settings of the plugins of these tests."""

    strength: float = Field(0.5, ge=0, description="factor of the gradient")


class GoodPlugin(Plugin[ScaleConfig]):
    """Scales the gradient by a growing factor, and logs it."""

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
    """Fails if a check raises a false alarm."""
    found = outcomes(GoodPlugin, configs=({"strength": 0.9},), off={"strength": 1.0})
    assert [outcome for outcome in found if outcome.status != "pass"] == []
    assert len({outcome.check for outcome in found}) == 24


def test_each_config_is_a_case_of_its_own() -> None:
    """Fails if only the first of several configs is tested: the fault is in the second."""
    found = outcomes(GoodPlugin, "trains", configs=({}, {"strength": 1e30}))
    assert [(o.case, o.status) for o in found] == [
        ("config 0, accumulate 1", "pass"),
        ("config 0, accumulate 3", "pass"),
        ("config 1, accumulate 1", "FAIL"),
        ("config 1, accumulate 3", "FAIL"),
    ]


# -- planted faults: a plugin with one fault, the check that must find it, and its message


class ReadsPlugin(GoodPlugin):
    """Reads the gradient norm on the host in each step."""

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.size = step.losses["tiny_next"].item()


class BranchesPlugin(GoodPlugin):
    """Branches on a tensor in a helper, which also syncs."""

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.high = is_high(step.losses["tiny_next"])


def is_high(loss: Tensor) -> bool:
    return True if loss > 1 else False  # noqa: SIM210


class CopiesPlugin(GoodPlugin):
    """Creates a tensor on the host and copies it to the device."""

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        scale_gradients(engine, torch.tensor(0.9, device=engine.device))


class MixesPlugin(GoodPlugin):
    """Adds gradients to a host tensor, wherever they are."""

    def __init__(self, config: ScaleConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.sums: dict[str, Tensor] = {}

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        for name, parameter in engine.model.named_parameters():
            if parameter.grad is not None:
                zero = torch.zeros(parameter.shape)
                self.sums[name] = self.sums.get(name, zero) + parameter.grad


class ReadsEarlyPlugin(GoodPlugin):
    """Reads a number before its copy to the host has completed."""

    @hookimpl
    def after_backward(self, engine: Engine, step: Step) -> None:
        size = step.losses["tiny_size"].to("cpu", non_blocking=True)
        scale_gradients(engine, float(size))


class DeviceDicePlugin(GoodPlugin):
    """Draws from its own device generator, which restarts on resume."""

    generator: torch.Generator

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        self.generator = torch.Generator(engine.device)

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        dice = torch.rand((), generator=self.generator, device=engine.device)
        scale_gradients(engine, dice)


class ForgetfulPlugin(GoodPlugin):
    """Does not save the state that its next steps depend on."""

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
    """Draws from its own generator, which restarts on resume."""

    def __init__(self, config: ScaleConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.dice = random.Random(0)

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        scale_gradients(engine, self.dice.random())


class DrawsAtStartPlugin(GoodPlugin):
    """Draws random numbers when a run starts, so a resumed run continues with different ones."""

    @hookimpl
    def on_start(self) -> None:
        torch.rand(3)


class SavingCountsPlugin(GoodPlugin):
    """Changes its behaviour whenever it is saved."""

    def state_dict(self) -> dict[str, Any]:
        self.level *= 0.9
        return {"level": self.level}


class SharedPlugin(GoodPlugin):
    """Keeps its state on the class, shared by all engines of a process."""

    levels: ClassVar[dict[str, float]] = {}

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        self.levels["now"] = self.levels.get("now", 1.0) * 0.9
        scale_gradients(engine, self.levels["now"])


class ThreadPlugin(GoodPlugin):
    """Starts a thread, and does not end it."""

    @hookimpl
    def on_start(self) -> None:
        self.stop = threading.Event()
        LEFT_OPEN.append(self.stop)
        threading.Thread(target=self.stop.wait, name="left-behind", daemon=True).start()


class FilePlugin(GoodPlugin):
    """Opens a file, and does not close it."""

    stream: IO[str]

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        assert engine.out is not None
        self.stream = (engine.out / "left-open.log").open("w")
        LEFT_OPEN.append(self.stream)


class ClosesOnFinishPlugin(FilePlugin):
    """Closes its file only if the run succeeds."""

    @hookimpl
    def on_finish(self) -> None:
        self.stream.close()


class ClosesUnopenedPlugin(FilePlugin):
    """Fails in on_close if the run failed before it opened anything."""

    @hookimpl
    def on_close(self) -> None:
        self.stream.close()


class SignalPlugin(GoodPlugin):
    """Installs a signal handler, and does not restore the previous one."""

    @hookimpl
    def on_start(self) -> None:
        signal.signal(signal.SIGUSR2, lambda *_: None)


class ModuleHookPlugin(GoodPlugin):
    """Registers a module hook, and does not remove it."""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        engine.model.register_forward_hook(lambda module, inputs, output: output * 0.5)


class PatchPlugin(GoodPlugin):
    """Replaces a method of the model, and does not restore it."""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        forward = engine.model.forward
        engine.model.forward = lambda input_ids: forward(input_ids) * 0.5  # type: ignore[method-assign]


class PrecisionPlugin(GoodPlugin):
    """Sets torch's matmul precision for the whole process."""

    @hookimpl
    def on_start(self) -> None:
        torch.set_float32_matmul_precision("medium")


class OpenConfig(PluginConfig):
    """Takes any key."""

    model_config = ConfigDict(extra="allow")


class OpenConfigPlugin(Plugin[OpenConfig]):
    """Takes any key."""


class UndescribedConfig(PluginConfig):
    """Has a field without a description."""

    power: float = 1.0


class UndescribedPlugin(Plugin[UndescribedConfig]):
    """Has a field without a description."""


class MisspeltPlugin(GoodPlugin):
    """Misspells on_step."""

    def on_stepp(self) -> None: ...


class MismarkedPlugin(GoodPlugin):
    """Misspells the marked on_eval."""

    @hookimpl
    def on_evall(self) -> None: ...


class WrongArgumentPlugin(GoodPlugin):
    """Uses an argument that the hook does not have."""

    @hookimpl
    def on_step(self, engin: Engine) -> None: ...


class CirclePlugin(GoodPlugin):
    """Declares to be both after and before clip."""

    after = ("clip",)
    before = ("clip",)


class OutstagedPlugin(GoodPlugin):
    """Declares to come after clip, but names a stage before clip's."""

    after = ("clip",)

    @hookimpl(stage="transform")
    def after_backward(self) -> None: ...


class UnknownStagePlugin(GoodPlugin):
    """Uses a stage that does not exist."""

    @hookimpl(stage="clip")
    def after_backward(self) -> None: ...


class BatchWrapperPlugin(GoodPlugin):
    """Wraps a chained seam."""

    @hookimpl(wrapper=True)
    def on_batch(self) -> Generator[None, Any, Any]:
        return (yield)


class EarlierNamePlugin(GoodPlugin):
    """Reads a deprecated attribute of the engine."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.loss = engine.losses["tiny_next"]


class StrangePartPlugin(GoodPlugin):
    """Adds an unknown part to the snapshot."""

    @hookimpl
    def on_save(self, snapshot: Any) -> None:
        snapshot["tag"] = {"git": "abc123"}


class StrangeCounterPlugin(GoodPlugin):
    """Adds an unknown counter to the snapshot."""

    @hookimpl
    def on_save(self, snapshot: Any) -> None:
        snapshot["train"]["rounds"] = 3


class ObjectExtraPlugin(GoodPlugin):
    """Adds an object to the snapshot that no checkpoint can store."""

    @hookimpl
    def on_save(self, snapshot: Any) -> None:
        snapshot["extras"][self.name] = {"at": Path("run")}


class OtherTypeExtraPlugin(GoodPlugin):
    """Adds a value that is restored as another type."""

    @hookimpl
    def on_save(self, snapshot: Any) -> None:
        snapshot["extras"][self.name] = {"words": Counter(a=2)}


class OtherTypeStatePlugin(GoodPlugin):
    """Saves a list subclass, which loses its methods."""

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "recent": Recent([1, 2])}


class Recent(list[int]):
    """A list with a method."""

    def newest(self) -> int:
        return self[-1]


class OtherWeightsPlugin(GoodPlugin):
    """Saves rounded weights instead of the trained ones."""

    @hookimpl
    def on_save(self, snapshot: Any) -> None:
        snapshot["model"] = {k: v.half().float() for k, v in snapshot["model"].items()}


class LatePlugin(GoodPlugin):
    """Declares to come before clip, but marks its hook as trylast."""

    before = ("clip",)

    @hookimpl(trylast=True)
    def after_backward(self, engine: Engine) -> None: ...


class StrangerPlugin(GoodPlugin):
    """Misspells the plugin that it comes before."""

    before = ("checkpiont",)


class TooLatePlugin(GoodPlugin):
    """Clips after the update."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        scale_gradients(engine, 0.5)


class EachMicroBatchPlugin(Plugin[ScaleConfig]):
    """Scales the accumulated gradient at each micro-batch."""

    @hookimpl(wrapper=True)
    def backward(self, engine: Engine) -> Generator[None, bool, bool]:
        done = yield
        scale_gradients(engine, self.config.strength)
        return done


class MeanPlugin(Loss[LossConfig]):
    """Returns the mean of a micro-batch instead of the sum."""

    def units(self, batch: dict[str, Tensor]) -> float:
        return float(len(batch["labels"]))

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return output.square().mean()


class NotOffPlugin(GoodPlugin):
    """Claims to be off, but is not."""


class GrowingPlugin(GoodPlugin):
    """Iterates over all previous losses in each step."""

    def __init__(self, config: ScaleConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.losses: list[Tensor] = []

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.losses.append(step.losses["tiny_next"])
        self.mean = sum(loss * 0.5 for loss in self.losses)


class ManyOperationsPlugin(GoodPlugin):
    """Uses a thousand operations instead of one."""

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        self.total = sum(step.losses["tiny_next"] for _ in range(1000))


class SlowPlugin(GoodPlugin):
    """Delays each step by 60 ms."""

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
    (ReadsPlugin, "device_is_not_waited_for", r"value of .* at test_testing.py:\d+ in on_step"),
    (BranchesPlugin, "device_is_not_waited_for", r"bool, .* in is_high: return True if loss"),
    (CopiesPlugin, "device_is_not_waited_for", r"a copy to the device .*torch.tensor\(0.9"),
    (MixesPlugin, "runs_on_an_accelerator", r"same device, .*'mixes', after_backward"),
    (ReadsEarlyPlugin, "runs_on_an_accelerator", r"parameters are not finite"),
    (DeviceDicePlugin, "runs_on_an_accelerator", r"resumed on an accelerator.*numbers differ"),
    (ForgetfulPlugin, "resume_is_bit_equal", r"resumed at step 1.*model\..*numbers differ"),
    (OwnDicePlugin, "resume_is_bit_equal", r"model\..*numbers differ"),
    (DrawsAtStartPlugin, "resume_is_bit_equal", r"differ"),
    (HalfLoadedPlugin, "state_round_trips", r"level: 0.015625, and 1.0"),
    (ObjectStatePlugin, "state_round_trips", r"object_state.state_dict\(\).since: PosixPath"),
    (SavingCountsPlugin, "saving_changes_nothing", r"reading the state .* changes the run"),
    (SharedPlugin, "engines_share_no_state", r"interleaved with another engine"),
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
    (OutstagedPlugin, "order_holds", r"before 'clip' in after_backward.*'transform' comes bef"),
    (UnknownStagePlugin, "hooks_are_known", r"no stage 'clip'; its stages: reduce, unscale"),
    (BatchWrapperPlugin, "hooks_are_known", r"on_batch cannot be wrapped: return the changed"),
    (EarlierNamePlugin, "names_are_present", r"engine.losses is step.losses since plugin API"),
    (StrangePartPlugin, "checkpoint_is_bit_equal", r"'strange_part'.* put 'tag' into the snap"),
    (StrangeCounterPlugin, "checkpoint_is_bit_equal", r"'strange_counter' put 'rounds' into"),
    (ObjectExtraPlugin, "checkpoint_is_bit_equal", r"'object_extra'.*at' is a pathlib.*PosixPath"),
    (OtherTypeExtraPlugin, "checkpoint_is_bit_equal", r"_extra.words' is a .*Counter"),
    (OtherTypeStatePlugin, "checkpoint_is_bit_equal", r"recent' is a .*Recent"),
    (OtherTypeStatePlugin, "state_round_trips", r"recent: Recent"),
    (ForgetfulPlugin, "checkpoint_is_bit_equal", r"resumed from files.*model\..*numbers differ"),
    (OtherWeightsPlugin, "checkpoint_is_bit_equal", r"model\..*numbers differ"),
    (LatePlugin, "order_holds", r"'clip' is called before 'late' in after_backward"),
    (StrangerPlugin, "order_holds", r"'checkpiont', which is not installed; did you.*checkpoint"),
    (TooLatePlugin, "gradient_is_left_alone_after_the_update", r"in step 1, gradients were chan"),
    (EachMicroBatchPlugin, "split_of_a_step_is_free", r"in three micro-batches"),
    (MeanPlugin, "split_of_a_step_is_free", r"in three micro-batches"),
    (NotOffPlugin, "off_is_absent", r"training differs from training without"),
    (GrowingPlugin, "operations_are_within_budget", r"operations grows with every step.*mul"),
    (ManyOperationsPlugin, "operations_are_within_budget", r"aten.add.Tensor 1000x"),
    (SlowPlugin, "time_is_within_budget", r"fastest step takes \d+"),
    (ExplodingPlugin, "trains", r"parameters are not finite"),
]


class Pair(NamedTuple):
    """A batch with names."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Rows:
    """A batch as a dataclass, with a list of rows that are not tensors."""

    x: Tensor
    y: Tensor
    names: list[str]


MAKES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "list": (lambda x, y: [x, y], lambda batch: batch),
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "named tuple": (Pair, lambda batch: batch),
    "dict in a list": (lambda x, y: [{"x": x}, y], lambda b: (b[0]["x"], b[1])),
    "UserDict": (lambda x, y: UserDict(x=x, y=y), lambda batch: (batch["x"], batch["y"])),
    "arrays": (
        lambda x, y: {"x": x.numpy(), "y": y.numpy()},
        lambda batch: (torch.as_tensor(batch["x"]), torch.as_tensor(batch["y"])),
    ),
    "rows of lists": (
        lambda x, y: {"x": x, "y": y.tolist()},
        lambda batch: (batch["x"], torch.tensor(batch["y"])),
    ),
    "dataclass": (lambda x, y: Rows(x, y, ["a", "b"]), lambda batch: (batch.x, batch.y)),
    "tensor": (
        lambda x, y: torch.cat([x, y[:, None].float()], 1),
        lambda batch: (batch[:, :5], batch[:, 5].long()),
    ),
}


@pytest.mark.parametrize("make", MAKES)
def test_a_step_is_split_in_batches_of_any_make(make: str) -> None:
    """Fails if the check compares different rows: a good plugin fails, or a bad one passes."""
    build, parts = MAKES[make]

    class ClassesPlugin(Loss[LossConfig]):
        """Cross-entropy."""

        def units(self, batch: Any) -> float:
            return float(len(parts(batch)[0]))

        def loss(self, batch: Any, output: Tensor) -> Tensor:
            return F.cross_entropy(output, parts(batch)[1], reduction="sum")

    class ReaderPlugin(Plugin[PluginConfig]):
        """Passes the model its part of the batch."""

        @hookimpl
        def forward(self, engine: Engine, batch: Any) -> Tensor:
            return engine.model(parts(batch)[0])

    def data(self: PluginContract) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(8, 2, 5, generator=generator)
        return [build(rows, rows.argmax(1) % 3) for rows in x]

    own: dict[str, Any] = {
        "model": lambda self: torch.nn.Linear(5, 3),
        "data": data,
        "losses": lambda self: [ClassesPlugin()],
        "beside": lambda self: [ReaderPlugin()],
    }
    check = "split_of_a_step_is_free"
    for plugin, status in ((GoodPlugin, "pass"), (EachMicroBatchPlugin, "FAIL")):
        assert [o.status for o in outcomes(plugin, check, **own)] == [status]


class LaxKeeperPlugin(Plugin[PluginConfig]):
    """Writes checkpoints in which every mapping becomes a dict."""

    kept: ClassVar[list[Any]] = []

    @hookimpl(stage="save")
    def on_finish(self, engine: Engine) -> None:
        self.kept.append(stored(engine.state_dict()))

    @hookimpl
    def load_snapshot(self) -> Any:
        return self.kept[-1]


def test_what_comes_back_as_something_else_is_seen_whoever_keeps_it() -> None:
    """Fails if the kit relies on the checkpoint plugin to reject what it cannot store."""
    beside = {"beside": lambda self: [LaxKeeperPlugin()]}
    (found,) = outcomes(OtherTypeExtraPlugin, "checkpoint_is_bit_equal", **beside)
    assert "extras.other_type_extra.words: Counter Counter({'a': 2}), and dict" in found.reason
    (found,) = outcomes(GoodPlugin, "checkpoint_is_bit_equal", **beside)
    assert found.status == "pass", found.reason
    assert LaxKeeperPlugin.kept, "the plugin of the run is asked before an installed one"


class HostOnlyPlugin(GoodPlugin):
    """Reads values only on the host, or when a log is due."""

    seen: float = 0.0

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        loss = step.losses["tiny_next"]
        if loss.is_cpu:
            self.seen = loss.item()
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


def test_a_plugin_hears_where_it_waits_for_an_accelerator() -> None:
    """Fails if free host reads are forbidden, or syncs are not reported."""
    check = "device_is_not_waited_for"
    (found,) = outcomes(HostOnlyPlugin, check)
    assert (found.status, found.said) == (
        "pass",
        ("runs on an accelerator: yes; device syncs: never",),
    )
    (found,) = outcomes(ReadsPlugin, check)
    (said,) = found.said
    assert re.search(r"yes; device syncs: at test_testing.py:\d+ in on_step: self.size = ", said)


def test_a_run_that_ends_too_soon_is_told() -> None:
    """Fails if checks pass, or fail obscurely, on runs that were too short to show anything."""
    for outcome in outcomes(StopsPlugin, "trains", "resume_is_bit_equal", "time_is_within_budget"):
        assert "the run ended at step 2 (it is late)" in outcome.reason


@pytest.fixture
def cleaned() -> Iterator[None]:
    """Restores what the planted faults leave behind."""
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
    ("plugin", "check", "message"),
    FAULTS,
    ids=[f"{plugin.name}-{check}" for plugin, check, _ in FAULTS],
)
def test_a_planted_fault_is_caught_by_its_check(
    plugin: type[Plugin[Any]], check: str, message: str
) -> None:
    """Fails if the check no longer finds the fault, or does not say where it is."""
    off: dict[str, Any] = {"off": {}} if check == "off_is_absent" else {}
    status = "hint" if check == "config_is_described" else "FAIL"
    failed = [outcome for outcome in outcomes(plugin, check, **off) if outcome.status == status]
    assert failed, f"{check} passes"
    assert re.search(message, failed[0].reason, re.DOTALL), failed[0].reason
