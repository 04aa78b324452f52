"""Compilation: the same training, for the selected modules, with everything restored."""

from __future__ import annotations

import copy
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.optim import SGD, AdamW, Optimizer

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, Step, hookimpl
from nexus_core.plan import load
from nexus_core.testing import HostAccelerator, Parts, host_accelerator, tiny_engine, tiny_model
from nexus_core.testing.states import differences, of_training
from nexus_plugins.compile import CompilePlugin
from nexus_plugins.compile.facts import Knowledge
from nexus_plugins.recompute import RecomputePlugin

# PyTorch's compiler warns about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """A sequence of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


def engine_of(*plugins: Any, model: nn.Module | None = None) -> Engine:
    torch.manual_seed(0)
    model = model or Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    return Engine(model, optimizer, loss=loss, plugins=plugins, log_every=1)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(3)]


def compiled(engine: Engine) -> list[str]:
    return [n for n, m in engine.model.named_modules() if m._compiled_call_impl is not None]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [f"blocks.{number}" for number in range(5)]),
        ({"match": ["*.blocks.[02]"]}, ["blocks.0", "blocks.2"]),
    ],
)
def test_the_chosen_modules_run_compiled_and_are_given_back(
    config: dict[str, Any], expected: list[str]
) -> None:
    """Fails if nothing or the wrong part is compiled, or parameter names change."""
    plain, engine = engine_of(), engine_of(CompilePlugin(backend="aot_eager", **config))
    plain.fit(data(), until="3 steps")
    for _ in engine.steps(data(), until="3 steps"):
        assert compiled(engine) == expected
    assert compiled(engine) == []
    assert engine.metrics["compile/graphs"] >= 1
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(engine.model.state_dict()[name], value)


def test_equal_blocks_share_one_graph() -> None:
    """Fails if a deep model is compiled once per layer: minutes instead of seconds."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    engine_of(CompilePlugin(backend="aot_eager")).fit(data(), until="2 steps")
    graphs = counters["stats"]["unique_graphs"] - before
    assert graphs <= 2, "one where the input needs no gradient, one for all others"


def test_a_model_without_lists_is_compiled_whole() -> None:
    """Fails if the default silently selects nothing."""
    engine = engine_of(CompilePlugin(backend="aot_eager"), model=nn.Sequential(nn.Linear(8, 1)))
    for _ in engine.steps(data(), until="1 step"):
        assert compiled(engine) == [""]


class Featured(Stack):
    """Is called through another method than `forward`, like models with a separate head."""

    def hidden(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x)


def test_the_whole_model_is_one_graph_and_its_method_is_given_back() -> None:
    """Fails if `whole` does not compile the method that plugins call, or does not restore it."""
    torch.manual_seed(0)
    models = [Featured(), Featured()]
    models[1].load_state_dict(models[0].state_dict())
    plain = engine_of(model=models[0])
    engine = engine_of(CompilePlugin(backend="aot_eager", whole=True), model=models[1])
    plain.fit(data(), until="3 steps")
    for _ in engine.steps(data(), until="3 steps"):
        assert compiled(engine) == [""]
        assert "hidden" in vars(engine.model)
    assert "hidden" not in vars(engine.model)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(engine.model.state_dict()[name], value)


def test_it_goes_with_recomputation_and_resumes_to_the_same_bits() -> None:
    """Fails if compiled code does not see the wrapped modules, or resuming is not exact."""

    def fresh() -> Engine:
        return engine_of(CompilePlugin(backend="aot_eager"), RecomputePlugin())

    whole, first, second = fresh(), fresh(), fresh()
    whole.fit(data(), until="4 steps")
    first.fit(data(), until="2 steps")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(data(), until="4 steps")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_what_is_saved_for_the_backward_pass_stays_for_a_second_one() -> None:
    """Fails if compiled code reuses its buffers, which pcgrad's second term still needs."""
    before = functorch_config.donated_buffer
    for _ in (engine := engine_of(CompilePlugin(backend="aot_eager"))).steps(
        data(), until="1 step"
    ):
        assert not functorch_config.donated_buffer
    assert engine.state.step == 1
    assert functorch_config.donated_buffer == before


@pytest.mark.slow
def test_the_default_compiler_trains_to_the_same_losses() -> None:
    """Fails if generated code computes something else."""
    plain, engine = engine_of(), engine_of(CompilePlugin())
    expected = plain.fit(data(), until="6 steps", eval_data=data()).metrics["val/loss"]
    got = engine.fit(data(), until="6 steps", eval_data=data()).metrics["val/loss"]
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"match": ["*.blok*"]}, r"compile\.match: the pattern '\*\.blok\*' matches no module"),
        ({"whole": True, "match": ["*.head"]}, "set only one"),
        (
            {"backend": "inducto"},
            "compile.backend is 'inducto', which is not available; known: .*indu",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(config: dict[str, Any], words: str) -> None:
    """Fails if a misspelt setting silently leaves the model uncompiled."""
    with pytest.raises(ConfigError, match=words):
        engine_of(CompilePlugin(**config)).fit(data(), until="1 step")


def test_a_machine_without_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the user gets a traceback from inside the compiler."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler on the CPU"):
        engine_of(CompilePlugin()).fit(data(), until="1 step")


# -- steps replayed from a graph, on the simulated accelerator


@pytest.fixture
def accelerator() -> Iterator[HostAccelerator]:
    """The device; code is not compiled on it, since its operations are written in Python."""
    with host_accelerator() as found, torch.compiler.set_stance("force_eager"):
        yield found


def counting_model() -> nn.Module:
    """The smallest model, with dropout, and a buffer of how often it has run."""
    model = tiny_model(dropout=0.2)
    model.register_buffer("runs", torch.zeros((), dtype=torch.int64))
    model.register_forward_hook(count_run)
    return model


def count_run(model: Any, *_: object) -> None:
    model.runs += 1


class HalvesPlugin(Plugin[PluginConfig]):
    """Changes the learning rate in each step, by a factor that does not round it."""

    @hookimpl
    def lr_scale(self, engine: Engine) -> float:
        return 0.5 ** (engine.state.step % 3)


class BreaksPlugin(Plugin[PluginConfig]):
    """Has an infinite gradient in the eighth step."""

    @hookimpl(stage="transform")
    def after_backward(self, engine: Engine) -> None:
        if engine.state.step == 7:
            for parameter in engine.parameters():
                cast(Tensor, parameter.grad).fill_(float("inf"))


def one_adamw(model: nn.Module, fused: bool = True) -> Optimizer:
    """With a rate that is the same number in float32, in which the device has it."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=2**-7, fused=fused)


def graphed(
    device: torch.device | str,
    *plugins: Plugin[Any],
    step_graph: bool = True,
    optimizer: Callable[[nn.Module], Any] = one_adamw,
    **settings: Any,
) -> Engine:
    """The smallest model, in steps of two micro-batches."""
    compiling = CompilePlugin(backend="eager", step_graph=step_graph)
    parts = Parts(model=counting_model, optimizer=optimizer)
    return tiny_engine(
        *plugins,
        compiling,
        parts=parts,
        device=device,
        log_every=1,
        **{"accumulate": 2, **settings},
    )


def run_to(
    engine: Engine, last: int, look: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """The logs of each step up to a given one, calling `look` after each; the horizon is later."""
    logged = []
    for state in engine.steps(until="100 steps"):
        own = engine.metrics.items()
        logged.append({k: v for k, v in own if not k.startswith(("compile/", "system/"))})
        look()
        if state.step == last:
            break
    return logged


class CarriesPlugin(Plugin[PluginConfig]):
    """Weights the loss by its running mean, in a tensor that each step replaces by a new one."""

    mean: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]

    @hookimpl(wrapper=True)
    def loss_terms(self, engine: Engine) -> Iterator[Any]:
        answers = yield
        if not engine.training:
            return answers
        (name, term), *others = answers[0].items()
        mean = torch.ones_like(term) if self.mean is None else self.mean
        self.mean = 0.9 * mean + 0.1 * term.detach()
        engine.log("carried", self.mean)
        return [{name: term * self.mean / 50.0, **dict(others)}, *answers[1:]]


@dataclass(slots=True)
class Slotted:
    """Has no `__dict__`, and is pickled without its value."""

    value: object = 1.0

    def __getstate__(self) -> None: ...


class ChangesPlugin(Plugin[PluginConfig]):
    """Weighs the loss by numbers that it changes between steps, and by drawn ones."""

    best = 0.0

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        self.deep = [[[[[Slotted() for _ in range(100)]]]]]
        self.generator = torch.Generator(engine.device).manual_seed(1)
        self.host_generator = np.random.default_rng(1)
        self.total = torch.zeros((), device=engine.device)

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.best = float("nan")
        self.host_generator.random()
        self.deep[0][0][0][0][80].value = 3.0 if engine.state.step == 5 else 1.0
        if engine.state.step == 7:
            self.total = torch.ones((), device=engine.device)
        if engine.state.step == 8:
            self.generator = torch.Generator(engine.device).manual_seed(2)

    @hookimpl(wrapper=True)
    def loss_terms(self, engine: Engine) -> Iterator[Any]:
        answers = yield
        if not engine.training:
            return answers
        drawn: Any = torch.rand((), generator=self.generator, device=engine.device)
        factor = drawn * self.deep[0][0][0][0][80].value + self.total.add_(0.1)
        return [{name: term * factor for name, term in terms.items()} for terms in answers]


TRAINED_WITH: dict[str, tuple[list[type[Plugin[Any]]], dict[str, dict[str, Any]], int]] = {
    "guard, clip and fp16": (
        [CarriesPlugin, HalvesPlugin],
        {
            "guard": {}, "clip": {"max_norm": 0.1},
            "amp": {"dtype": "fp16", "initial_scale": 2**21, "growth_interval": 2},
        }, 5,  # the seventh overflows
    ),
    "optim_muon, guard, clip and curriculum": (
        [CarriesPlugin, HalvesPlugin, BreaksPlugin],
        {
            "optim_muon": {"lr": 2**-7, "weight_decay": 2**-4, "adjust": "original"},
            "guard": {}, "clip": {"max_norm": 0.1},
            "curriculum": {
                "start_length": 4, "end_length": 8, "warmup": "3 steps", "round_to": 4
            },
        }, 1,
    ),
    "freeze": (
        [ChangesPlugin], {"freeze": {"rules": [{"match": "embedding.*", "until": "2 steps"}]}}, 2,
    ),
}  # fmt: skip
"""Plugins, and the minimum number of replayed steps out of 9."""


@pytest.mark.filterwarnings("ignore:skipped the update of step")
@pytest.mark.parametrize("name", TRAINED_WITH)
def test_replayed_steps_have_the_bits_and_metrics_of_eager_ones(
    name: str, accelerator: HostAccelerator
) -> None:
    """Fails if a graph draws other numbers, or reads or leaves data of other steps.

    With `curriculum` and `freeze`, the replayed work changes during the run.
    """
    own, settings, least = TRAINED_WITH[name]
    found = []
    for step_graph in (False, True):
        plugins = [load(plugin)(**given) for plugin, given in settings.items()]
        made = [kind() for kind in own]
        engine = graphed(accelerator.device, *plugins, *made, step_graph=step_graph)
        found.append((run_to(engine, 9), of_training(engine.state_dict())))
    assert engine.metrics["compile/replayed_steps"] >= least
    assert engine.metrics["compile/replayed_updates"] >= least
    assert found[0][0] == found[1][0]
    assert differences(found[0][1], found[1][1]) == []


def test_a_replayed_step_waits_for_nothing_but_its_log(accelerator: HostAccelerator) -> None:
    engine = graphed(accelerator.device)
    waits = []
    for state in engine.steps(until="8 steps"):
        waits.append([wait.file.rpartition("/")[2] for wait in accelerator.waits])
        accelerator.waits.clear()
        assert state.step < 8 or waits[-1] == waits[-2] == ["meter.py"]
    assert engine.metrics["compile/replayed_steps"] == 5


def test_a_run_resumed_among_replayed_steps_ends_in_the_same_bits(
    accelerator: HostAccelerator,
) -> None:
    """Fails if a replayed step differs from the eager ones right after a resume.

    Also loads a snapshot within a run, which must replace what the graph had.
    """

    def fresh() -> Engine:
        usual = [load(name)() for name in ("optim_muon", "lr_cosine", "guard", "clip")]
        return graphed(accelerator.device, CarriesPlugin(), *usual, accumulate=1)

    run_to(whole := fresh(), 9)
    run_to(first := fresh(), 5)
    taken = copy.deepcopy(first.state_dict())
    second = fresh()
    second.load_state_dict(taken)
    run_to(second, 9)
    for engine in (first, second):  # the first step has no mean yet, so it differs from the others
        assert engine.metrics["compile/replayed_steps"] == 1
        assert engine.metrics["compile/replayed_updates"] == 1
    ends = [of_training(engine.state_dict()) for engine in (whole, second)]
    assert differences(*ends) == []
    steps = first.steps(until="100 steps")
    for state in steps:
        if state.step == 9:
            first.rewind(taken)
            replayed = first.plugins["compile"]._graphs.replayed  # type: ignore[attr-defined]
            assert replayed == 0, "it is captured anew"
        if state.step == 10:
            break
    weight = next(name for name in taken["model"] if name.endswith("weight"))
    moved = first.model.state_dict()[weight] - taken["model"][weight]
    assert 0 < moved.abs().max() < 0.1, "one step from there"


class Descent(Optimizer):
    """Moves each weight by its gradient times the learning rate, on the device."""

    capturable = True

    def __init__(self, params: Any, calls: list[object] | None = None) -> None:
        super().__init__(params, {"lr": 2**-7})
        self._calls = calls

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                self.move(parameter, parameter.grad, group["lr"])

    def move(self, weight: Any, gradient: Tensor, rate: Any) -> None:
        if self._calls is not None:
            self._calls.append(weight)
        weight.sub_(gradient * rate)


class Frozen(Descent):
    """Takes the learning rate to the host: a graph would have the same one forever."""

    def move(self, weight: Any, gradient: Tensor, rate: Any) -> None:
        weight.sub_(gradient * float(rate))


class Decides(Descent):
    """Skips every other update, which the host decides."""

    count = 0

    def move(self, weight: Any, gradient: Tensor, rate: Any) -> None:
        self.count += 1
        weight.sub_(gradient * rate * (self.count % 2))


class Replaces(Descent):
    """Has a new tensor of momentum after each update."""

    def move(self, weight: Any, gradient: Tensor, rate: Any) -> None:
        state = self.state[weight]
        state["mean"] = gradient + state.get("mean", 0.0) * 0.5
        weight.sub_(state["mean"] * rate)


class Undeclared(Descent):
    """May do anything."""

    capturable = False


def one_each(model: nn.Module) -> dict[str, Optimizer]:
    """A kind of optimizer for each of the model's parameters."""
    descent = partial(Descent, calls=[])
    kinds = (
        descent,
        Frozen,
        Decides,
        Replaces,
        Undeclared,
        AdamW,
        partial(SGD, momentum=0.5, fused=True),
    )
    made = zip(kinds, model.parameters(), strict=True)
    return {str(number): kind([parameter]) for number, (kind, parameter) in enumerate(made)}


def test_updates_are_replayed_of_optimizers_that_leave_the_host_alone(
    accelerator: HostAccelerator,
) -> None:
    """Fails if a learning rate or a decision of the host is frozen in a graph.

    Or if a replay calls the optimizer, or the others are not replayed because of one.
    """
    ends = []
    for step_graph in (False, True):
        engine = graphed(
            accelerator.device,
            HalvesPlugin(),
            step_graph=step_graph,
            optimizer=one_each,
            accumulate=1,
        )
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run_to(engine, 7)
        ends.append(engine.model.state_dict())
    assert engine.metrics["compile/replayed_steps"] == 4
    assert engine.metrics["compile/replayed_updates"] == 3 * 4
    assert len(engine.optimizer.named["0"]._calls) == 3 + 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-7)
    said = [str(each.message).rpartition("graph: ")[2] for each in found]
    assert said[0].startswith("the host waits for the device at test_compile.py:")
    assert said[1:] == [
        "the host changes 'count' of Decides",
        "the host changes 'mean' of the state of Replaces",
        "Undeclared takes its learning rate from the host",
    ]


def test_the_state_of_an_optimizer_is_that_of_a_run_without_graphs(
    accelerator: HostAccelerator,
) -> None:
    """Fails if the learning rate of a checkpoint is a tensor, or a state cannot be loaded."""

    def fresh(step_graph: bool) -> Engine:
        kind = partial(one_adamw, fused=False)
        return graphed(accelerator.device, step_graph=step_graph, optimizer=kind, accumulate=1)

    run_to(whole := fresh(False), 6)
    state = run_to(first := fresh(False), 1) and first.state_dict()
    for step_graph, last in ((True, 5), (False, 6)):
        engine = fresh(step_graph)
        engine.load_state_dict(state)
        run_to(engine, last)
        state = engine.state_dict()
        assert state["optimizer"]["param_groups"] == whole.optimizer.state_dict()["param_groups"]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-4, atol=1e-6)


class BetweenPlugin(Plugin[PluginConfig]):
    """Does something between the backward pass and the update."""

    def __init__(self, does: Callable[[Engine], object]) -> None:
        super().__init__()
        self.does = does

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        self.does(engine)


def replaces_gradients(engine: Engine) -> None:
    for parameter in engine.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad * 1


def decays_more(engine: Engine) -> None:
    engine.optimizer.param_groups[0]["weight_decay"] += 2**-7


def decays_more_once(engine: Engine) -> None:
    if engine.state.step == 5:
        decays_more(engine)


def begins_late(engine: Engine) -> None:
    if engine.state.step < 3:
        engine.parameters()[0].grad = None


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (replaces_gradients, "a plugin replaces gradients between"),
        (decays_more, "'weight_decay' of a parameter group of AdamW changes from step to step"),
    ],
)
def test_updates_run_eagerly_if_plugins_change_them_each_time(
    does: Callable[[Engine], object], reason: str, accelerator: HostAccelerator
) -> None:
    engine = graphed(accelerator.device, BetweenPlugin(does), accumulate=1)
    with pytest.warns(RuntimeWarning, match=f"updates run eagerly .*: {reason}"):
        run_to(engine, 5)
    assert engine.metrics["compile/replayed_steps"] == 2
    assert engine.metrics["compile/replayed_updates"] == 0


@pytest.mark.parametrize(("does", "replayed"), [(decays_more_once, 2 + 1), (begins_late, 2)])
def test_updates_are_captured_again_if_a_plugin_changes_them(
    does: Callable[[Engine], object], replayed: int, accelerator: HostAccelerator
) -> None:
    """Fails if a graph has other settings than the optimizer, or creates state in each replay."""
    ends = []
    for step_graph in (False, True):
        between = BetweenPlugin(does)
        engine = graphed(accelerator.device, between, step_graph=step_graph, accumulate=1)
        run_to(engine, 9)
        ends.append(of_training(engine.state_dict()))
    assert engine.metrics["compile/replayed_updates"] == replayed
    assert differences(*ends) == []


class Seven:
    """A metric with a state of its own."""

    def compute(self) -> float:
        return 7.0

    def reset(self) -> None: ...


class DoesPlugin(Plugin[PluginConfig]):
    """Does something before each forward pass."""

    def __init__(self, does: Callable[[Any, Engine, Step, Any], object]) -> None:
        super().__init__()
        self.does, self.count, self.numbers = does, 0, [torch.zeros(())]
        self.generators = [random.Random(), np.random.default_rng(), torch.Generator()]
        self.own: object = None

    @hookimpl(wrapper=True)
    def forward(self, engine: Engine, batch: Any, step: Step | None) -> Iterator[Any]:
        output = yield
        if step is not None:
            self.does(self, engine, step, batch)
        return output


class HiddenPlugin(Plugin[PluginConfig]):
    """Takes no part in the gradient, but may be called in the backward pass."""

    def __init__(self, is_called: bool) -> None:
        super().__init__()
        self.is_called, self.count = is_called, 0

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        for parameter in engine.parameters() if self.is_called else ():
            parameter.register_post_accumulate_grad_hook(self.counts)  # type: ignore[no-untyped-call]

    def counts(self, *_: object) -> None:
        self.count += 1


def waits(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    next(iter(engine.model.parameters())).sum().item()


def counts(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    plugin.count += 1


def keeps(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    plugin.numbers.append(batch["input_ids"].sum())


def hides(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    """The other plugin does something."""


def looks(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    assert engine.plugins["hidden"].count == 0  # type: ignore[attr-defined]


def reads(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    assert engine.state.step >= 0


def asks(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    assert step.number > 0


def sees(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    assert "train/none" not in engine.metrics


def decays(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    assert engine.optimizer.param_groups[0]["lr"] >= 0


def draws(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    random.random()


def draws_from(number: int, plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    source = plugin.generators[number]
    torch.rand((), generator=source) if number == 2 else source.random()


def says(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    engine.hook.on_note(engine=engine, title="does", text="is done")


def measures(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    engine.log("seven", Seven())


def has(make: Callable[[Engine], object], plugin: Any, engine: Engine, *_: object) -> None:
    plugin.own = plugin.own or [make(engine)]


def views(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
    plugin.own = next(iter(engine.model.parameters())).detach()


COMPARED = "'own' of the plugin 'does' cannot be compared from step to step: "


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (waits, r"the host waits for the device at test_compile\.py:\d+"),
        (counts, "'count' of the plugin 'does' changes from step to step"),
        (keeps, "'numbers' of the plugin 'does' changes from step to step"),
        (hides, "the host changes 'count' of the plugin 'hidden'"),
        (looks, r"another plugin is read at test_compile\.py"),
        (reads, r"the progress of the run is read at test_compile\.py"),
        (asks, r"the progress of the run is read at test_compile\.py"),
        (sees, r"a metric is read at test_compile\.py"),
        (decays, r"a setting of the optimizer is read at test_compile\.py"),
        (draws, "random numbers are drawn on the host"),
        *((partial(draws_from, n), "random numbers are drawn on the host") for n in range(3)),
        (says, r"on_note is called at test_compile\.py"),
        (measures, "the metric 'train/seven' keeps state"),
        (partial(has, lambda _: Lock()), f"{COMPARED}cannot pickle '_thread.lock' object"),
        (partial(has, lambda _: random.SystemRandom()), f"{COMPARED}System entropy source"),
        (partial(has, lambda _: [0.5] * 10_000), f"{COMPARED}it is too large"),
        (partial(has, lambda _: torch.zeros(20_000)), f"{COMPARED}it is too large"),
        (
            partial(has, lambda engine: torch.ones((), device=engine.device, requires_grad=True)),
            "a plugin holds tensors that get a gradient",
        ),
        (views, "'own' of the plugin 'does' shares its memory with another tensor"),
    ],
)
def test_what_a_graph_would_not_repeat_is_found_and_the_steps_run_eagerly(
    does: Callable[..., None], reason: str, accelerator: HostAccelerator
) -> None:
    """Fails if a step is replayed that does more on the host than a graph can hold."""
    plugins = DoesPlugin(does), HiddenPlugin(does is hides)
    engine = graphed(accelerator.device, *plugins, accumulate=1)
    with pytest.warns(
        RuntimeWarning, match=f"run eagerly instead of from a graph: {reason}"
    ) as said:
        logged = run_to(engine, 5)
    assert len([each for each in said if "step_graph" in str(each.message)]) == 1
    assert engine.metrics["compile/replayed_steps"] == 0
    expected = 7.0 if does is measures else None
    assert [each.get("train/seven") for each in logged] == [expected] * 5


class HoldsPlugin(Plugin[PluginConfig]):
    """Holds something, and takes part in the gradient."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held

    @hookimpl(wrapper=True)
    def forward(self) -> Iterator[Any]:
        return (yield)


def in_a_function(value: object) -> Callable[[], object]:
    return lambda: value


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.text(max_size=2))
HELD = st.recursive(
    PLAIN,
    lambda of: st.one_of(
        st.lists(of, max_size=2),
        st.dictionaries(st.text(max_size=2), of, max_size=2),
        st.tuples(of),
        st.builds(Slotted, of),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def holding() -> Engine:
    return tiny_engine(HoldsPlugin(None))


@given(one=HELD, other=HELD)
def test_host_state_is_compared_all_the_way_down(
    holding: Engine, one: object, other: object
) -> None:
    """Fails if a change is overlooked, or nan is taken for one; the oracle is the text of it."""
    keys = []
    for held in (one, other, one):
        vars(holding.plugins["holds"])["held"] = in_a_function([np.float64(3), held])
        keys.append(Knowledge(holding).key)
    assert keys[0] == keys[2]
    assert repr(one) == repr(other) or keys[0] != keys[1]


class NamedPlugin(Plugin[PluginConfig]):
    """Gives each batch its own length, or a name."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named

    @hookimpl
    def on_batch(self, engine: Engine, batch: dict[str, Any]) -> dict[str, Any]:
        if self.named:
            return {**batch, "name": object()}
        return {k: v[:, : 3 + engine.state.step] if v.ndim > 1 else v for k, v in batch.items()}


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (False, "the shape of the batches changes from step to step"),
        (True, "a batch holds a object"),
    ],
)
def test_batches_that_no_graph_holds_are_told(
    named: bool, reason: str, accelerator: HostAccelerator
) -> None:
    engine = graphed(accelerator.device, NamedPlugin(named), accumulate=1)
    with pytest.warns(RuntimeWarning, match=reason):
        run_to(engine, 5 - 3 * named)


class AlternatesPlugin(HoldsPlugin):
    """Has a new number in every other step."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.held = engine.state.step if engine.state.step % 2 else 0


def test_few_kinds_of_steps_are_told_apart_and_nothing_is_kept_once_there_are_more(
    accelerator: HostAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if memory grows with every new kind that comes between steps of an old one."""
    monkeypatch.setattr("nexus_plugins.compile.graphs.KINDS", 5)
    gc.collect()  # what other tests left in the device's memory, which is that of the process
    engine, seen = graphed(accelerator.device, AlternatesPlugin(0), accumulate=1), []
    look = lambda: seen.append((engine.metrics["compile/replayed_steps"], accelerator.allocated))  # noqa: E731
    with pytest.warns(RuntimeWarning, match="'held' of the plugin 'alternates' changes from step"):
        run_to(engine, 10, look)
    replayed, memory = zip(*seen, strict=True)
    assert replayed[5] == 0 < replayed[8] == replayed[9]
    assert memory[0] == memory[5] == memory[9] < memory[8]


def test_a_step_that_cannot_be_captured_is_one_error(accelerator: HostAccelerator) -> None:
    """Fails if PyTorch's error comes through as it is; a copy is seen in the capture alone.

    Or if what was captured, and never computed, is left to the checkpoint of an error.
    """

    def copies(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
        if step.place == 1:
            torch.zeros(3, device=engine.device).copy_(torch.ones(3), non_blocking=True)

    words = "cannot be captured in a graph: a copy .*not pinned.*; leave out compile.step_graph"
    engine = graphed(accelerator.device, CarriesPlugin(), DoesPlugin(copies))
    ends: list[Any] = []
    with pytest.raises(ConfigError, match=words):
        run_to(engine, 9, lambda: ends.append(copy.deepcopy(of_training(engine.state_dict()))))
    assert differences(ends[-1], of_training(engine.state_dict())) == []


def test_a_step_that_fails_leaves_the_queues_in_order(
    accelerator: HostAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if what comes after it does not wait for what was queued beside."""

    def fails(plugin: Any, engine: Engine, step: Step, batch: Any) -> None:
        raise RuntimeError("no more")

    stream, waited = torch.get_device_module(accelerator.device).Stream, []
    monkeypatch.setattr(stream, "wait_stream", lambda one, other: waited.append((one, other)))
    with pytest.raises(RuntimeError, match="no more"):
        run_to(graphed(accelerator.device, DoesPlugin(fails)), 1)
    (beside, _), (_, awaited) = waited
    assert awaited is beside


def test_a_replayed_step_that_fails_is_undone(accelerator: HostAccelerator) -> None:
    """Fails if it is not known that a graph writes to buffers, too, of whole numbers."""

    class FailsPlugin(Plugin[PluginConfig]):
        @hookimpl
        def after_backward(self, engine: Engine) -> None:
            if engine.state.step == 5:
                raise RuntimeError("no more")

    engine = graphed(accelerator.device, FailsPlugin())
    with pytest.raises(RuntimeError, match="no more"):
        run_to(engine, 9)
    assert engine.plugins["compile"]._graphs is None
    assert engine.model.runs == 10  # of 5 steps


def test_a_run_that_can_have_no_graph_is_refused(accelerator: HostAccelerator) -> None:
    with pytest.raises(ConfigError, match="step_graph: cpu has no graphs; run on cuda"):
        run_to(graphed("cpu"), 1)
    with pytest.raises(ConfigError, match="a run in cells seeds the generators within a step"):
        run_to(graphed(accelerator.device, cells=2), 1)
    with pytest.raises(ConfigError, match="mode=reduce-overhead makes its own graphs"):
        CompilePlugin(step_graph=True, mode="reduce-overhead")
