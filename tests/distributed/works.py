"""The work of the test processes: short runs of the tiny problem, and their results."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_core import Engine, NexusError, Plugin, PluginConfig, ResumableLoader, RunData, hookimpl
from nexus_core.cli.run import main as nexus_run
from nexus_core.plan import load
from nexus_core.processes import Ranks, local_part, whole
from nexus_plugins._shared.buffers import share_buffers
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from tiny import AbsolutePlugin, Net, RecorderPlugin, Regression, SquaredPlugin


def command(folder: Path, arguments: list[str], environment: dict[str, str] | None = None) -> str:
    """The output of `nexus-run` in a folder, as one of the processes of a launcher."""
    os.environ |= environment or {}
    os.chdir(folder)
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit, match="^0$"):
        nexus_run(arguments)
    return said.getvalue()


@dataclass
class Seen:
    """The results of one process."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)  # per step
    weights: list[float] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    first: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, list[float]] = field(default_factory=dict)
    marks: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of this process's tensors
    hooks: list[int] = field(default_factory=list)
    status: str = ""
    reason: str = ""
    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


class WitnessPlugin(Plugin[PluginConfig]):
    """Records the samples of each step."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    @hookimpl
    def on_batch(self, engine: Engine, batch: Any) -> None:
        while len(self.seen.ids) <= engine.state.step:
            self.seen.ids.append([])
        self.seen.ids[engine.state.step] += batch["sample_ids"].tolist()


class StopperPlugin(Plugin[PluginConfig]):
    """Stops the run after a step."""

    at, reason = 0, ""

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        if engine.state.step + 1 == self.at:
            engine.stop(self.reason)


class DamagePlugin(Plugin[PluginConfig]):
    """Corrupts one step, in one process or all, before other plugins see it."""

    before = ("amp", "guard", "clip")

    def __init__(self, step: int, ranks: tuple[int, ...], loss: float = 1.0, grad: float = 0.0):
        super().__init__()
        self.step, self.ranks, self.factor, self.grad = step, ranks, loss, grad

    @hookimpl(wrapper=True)
    def loss_terms(self, engine: Engine) -> Any:
        answers = yield
        if not self._now(engine):
            return answers
        return [{name: term * self.factor for name, term in a.items()} for a in answers]

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        if self._now(engine) and self.grad:
            weight = next(engine.model.parameters())
            local_part(weight.grad)[0, 0] = self.grad

    def _now(self, engine: Engine) -> bool:
        return (
            engine.training
            and engine.state.step + 1 == self.step
            and engine.ranks.rank in self.ranks
        )


class UnreachedNet(Net):
    """Has a layer that no loss reaches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unreached = nn.Linear(3, 3)


class Block(nn.Module):
    """A residual layer with a list of sublayers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width, bias=False)])
        self.register_buffer("scale", torch.rand(width))
        self.register_buffer("shift", torch.rand(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = x + torch.tanh(layer(x)) * self.scale + self.shift
        return x


@dataclass
class Output:
    """The output of a model with a tied head: the head's weight is a parameter."""

    hidden: Tensor
    weight: Tensor


class DeepNet(nn.Module):
    """A model that is hard to shard.

    It has nested lists, non-persistent buffers, tied, frozen and marked weights, a scalar, odd
    sizes, and an output that contains a weight.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.read = nn.Linear(5, 7)
        self.blocks = nn.ModuleList([Block(7), Block(7)])
        self.marked = nn.Parameter(torch.rand(7, 7) / 7)
        self.marked._no_weight_decay = True
        self.frozen = nn.Parameter(torch.rand(3, 7), requires_grad=False)
        self.sharpness = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(7, 4, bias=False)
        self.twin = nn.Linear(7, 4, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Output:
        x = self.read(x)
        for block in self.blocks:
            x = block(x)
        x = x @ self.marked + (x @ self.frozen.T).sum(-1, keepdim=True) * self.sharpness
        return Output(x, self.twin.weight)


class DeepPlugin(Plugin[PluginConfig]):
    """Creates a `DeepNet` and its data; records the initial weights."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    @hookimpl
    def make_data(self) -> RunData:
        ranks = Ranks.current()
        valid = ResumableLoader(Regression(11), 4, shuffle=False, ranks=ranks)
        return RunData(ResumableLoader(Regression(), 6, seed=1, ranks=ranks), {"val": valid})

    @hookimpl
    def make_model(self) -> nn.Module:
        return DeepNet()

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        self.seen.first = whole_state(engine.model)
        named = engine.model.named_parameters()
        self.seen.marks = {n: (p.requires_grad, hasattr(p, "_no_weight_decay")) for n, p in named}

    @hookimpl(wrapper=True)
    def forward(self, engine: Engine) -> Any:
        output = yield
        self.seen.hooks.append(len(output.weight._backward_hooks or ()))
        return output.hidden.to(output.weight.dtype) @ output.weight.T


def whole_state(model: nn.Module) -> dict[str, list[float]]:
    """Every parameter and buffer of a model, exactly."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: whole(value.detach()).reshape(-1).tolist() for name, value in named}


def train_deep(
    make: Callable[[], Plugin[Any]], steps: int, *extra: Callable[[], Plugin[Any]], **options: Any
) -> Seen:
    """A run with everything made by plugins."""
    seen, recorder, parallel = Seen(), RecorderPlugin(), make()
    parallel.join()
    optimizer = OptimAdamwPlugin(lr=1e-2, eps=1e-4, weight_decay=0.1)
    plugins = [parallel, DeepPlugin(seen), SquaredPlugin(), optimizer, ClipPlugin(), recorder]
    plugins += [make_extra() for make_extra in extra]
    engine = Engine(plugins=plugins, seed=5, log_every=1, **options)
    engine.fit(until=steps, eval_every=3)
    seen.logged = [line for _, line in recorder.lines]
    seen.last = whole_state(engine.model)
    seen.shapes = [tuple(local_part(p).shape) for p in engine.model.parameters()]
    return seen


TEXT_RUN: dict[str, dict[str, Any]] = {
    "data_text": {"seq_len": 32, "batch_size": 8, "valid_limit": 64},
    "model_nexus": {"d_model": 16, "ssm_n_layers": 2, "ssm_head_dim": 16, "ssm_d_state": 8},
    "loss_lm": {},
    "optim_adamw": {"lr": 1e-3, "eps": 1e-4},
}


def train_text(
    make: Callable[[], Plugin[Any]], corpus: Path, steps: int, **more: dict[str, Any]
) -> Seen:
    """A run of the NEXUS model on a corpus, with additional plugins by name."""
    seen, recorder, parallel = Seen(), RecorderPlugin(), make()
    parallel.join()
    blocks = {**TEXT_RUN, **more}
    blocks["data_text"] = {**TEXT_RUN["data_text"], "train": str(corpus)}
    plugins = [load(name)(**settings) for name, settings in blocks.items()]
    engine = Engine(plugins=[parallel, recorder, *plugins], seed=1, log_every=1)
    engine.fit(until=steps, eval_every=5)
    seen.logged = [line for _, line in recorder.lines]
    seen.samples, seen.tokens = engine.state.samples, engine.state.tokens
    return seen


class CrossedNet(DeepNet):
    """Ties a weight of a block to one outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(7, 7, bias=False)
        self.tied.weight = self.blocks[0].inner[1].weight


class TableNet(Net):
    """Has a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(3)


class ReadNet(Net):
    """Reads a weight while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.head.weight.max().item()


class Opaque:
    """An opaque output."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class OpaqueNet(Net):
    """Hides its output."""

    def forward(self, x: Tensor) -> Any:
        return Opaque(super().forward(x))


class MakerPlugin(Plugin[PluginConfig]):
    """Creates a model, and unwraps an opaque output."""

    def __init__(self, model: type[nn.Module]) -> None:
        super().__init__()
        self.model = model

    @hookimpl
    def make_data(self) -> RunData:
        return RunData([])

    @hookimpl
    def make_model(self) -> nn.Module:
        return self.model()

    @hookimpl(wrapper=True)
    def forward(self) -> Any:
        output = yield
        return getattr(output, "value", output)


def build(
    model: type[nn.Module],
    program_model: bool = True,
    program_optimizer: bool = False,
    **settings: Any,
) -> None:
    """Train a sharded model for a step; model and optimizer come from the program or a plugin."""
    plugin = FsdpPlugin(timeout=20, **settings)
    plugin.join()
    brought = model() if program_model else None
    optimizer = torch.optim.SGD(brought.parameters(), lr=0.1) if program_optimizer else None
    plugins = [plugin, MakerPlugin(model), SquaredPlugin(), OptimAdamwPlugin()]
    batch = {"x": torch.ones(4, 5), "y": torch.ones(4, 4)}
    Engine(brought, optimizer, plugins=plugins).fit([batch], until=1)


def refused(*tries: Callable[[], object]) -> list[str]:
    """The error of each attempt, or "" if there is none."""
    return [_error(attempt) for attempt in tries]


def _error(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except NexusError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train(
    steps: int | str,
    *extra: Callable[[], Plugin[Any]],
    size: int = 23,
    batch: int = 6,
    accumulate: int = 1,
    unreached: bool = False,
    dropout: float = 0.0,
    out: Path | None = None,
    resume: bool = False,
    every: int = 5,
    parallel: Plugin[Any] | None = None,
    optimizer: Callable[[], Plugin[Any]] | None = None,
    net: Callable[..., nn.Module] = Net,
    stop_at: int | None = None,
    stop_rank: int | None = None,
    **options: Any,
) -> Seen:
    """A run on the tiny problem; under a launcher the processes share it.

    If an optimizer is given, a plugin makes it, as required for sharded weights.
    """
    seen, recorder = Seen(), RecorderPlugin()
    plugins = [parallel or DdpPlugin(timeout=20)]
    plugins[0].join()
    ranks = Ranks.current()
    torch.manual_seed(3)
    model = (UnreachedNet if unreached else net)(dropout=dropout)
    made = None if optimizer else torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    stopper = StopperPlugin()
    plugins += [
        stopper,
        SquaredPlugin(),
        AbsolutePlugin(weight=0.3),
        recorder,
        WitnessPlugin(seen),
        *(make() for make in ([optimizer] if optimizer else [])),
        *(make() for make in extra),
    ]
    if out is not None:
        plugins.append(CheckpointPlugin(every=every))
    engine = Engine(
        model, made, plugins=plugins, seed=5, log_every=1, accumulate=accumulate, out=out
    )
    if stop_at is not None and stop_rank in (None, ranks.rank):
        stopper.at, stopper.reason = stop_at, f"rank {ranks.rank} stops"
    data = ResumableLoader(Regression(size), batch, seed=1, ranks=ranks)
    valid = ResumableLoader(Regression(11 if size == 23 else 9), 4, shuffle=False, ranks=ranks)
    if resume:
        engine.resume()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = engine.fit(data, until=steps, eval_data=valid, **options)
    seen.warnings = [str(warning.message) for warning in warned]
    lines = [line for _, line in recorder.lines]
    seen.losses = [line["train/total_loss"] for line in lines if "train/total_loss" in line]
    seen.evaluations = [line for line in lines if "val/loss" in line]
    seen.logged = [line for line in lines if "train/total_loss" in line]
    seen.weights = torch.cat([whole(p.detach()).reshape(-1) for p in model.parameters()]).tolist()
    seen.status, seen.reason, seen.step = result.status, result.reason, result.step
    seen.samples, seen.tokens = engine.state.samples, engine.state.tokens
    seen.seconds = engine.state.seconds
    return seen


def train_with(make: Callable[[], Plugin[Any]], *arguments: Any, **options: Any) -> Seen:
    """`train` with a plugin created in each process."""
    return train(*arguments, parallel=make(), **options)


def train_apart(folder: Path) -> Seen:
    """Resume from a separate folder in each process."""
    return train(8, out=folder / os.environ["RANK"], resume=True)


class GamePlugin(Plugin[PluginConfig]):
    """Two optimizers that take turns."""

    @hookimpl
    def take_turns(self) -> list[str]:
        return ["hidden", "head"]


def play() -> None:
    """A step of two optimizers that take turns."""
    parallel = DdpPlugin(timeout=20)
    parallel.join()
    model = Net()
    optimizers = {
        "hidden": torch.optim.SGD(model.hidden.parameters(), lr=0.1),
        "head": torch.optim.SGD(model.head.parameters(), lr=0.1),
    }
    engine = Engine(model, optimizers, plugins=[parallel, SquaredPlugin(), GamePlugin()])
    engine.fit([{"x": torch.ones(4, 5), "y": torch.ones(4, 4)}], until=1)


def search() -> list[float]:
    """The weights after steps of an optimizer that evaluates the gradient repeatedly."""
    parallel = DdpPlugin(timeout=20)
    parallel.join()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    engine = Engine(model, optimizer, plugins=[parallel, SquaredPlugin()], accumulate=2)
    data = ResumableLoader(Regression(), 6, seed=1, ranks=Ranks.current())
    engine.fit(data, until=4)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


class OwnRows:
    """A loader per process with its own position and rows."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.at = ranks, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.at < 20 + self.ranks.rank:
            self.at += 1
            row = 100 * self.ranks.rank + self.at
            x = torch.full((1, 3), row / 100)
            yield {"x": x, "y": x[:, :1], "sample_ids": torch.tensor([row])}
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def train_on_own_rows(steps: int, out: Path) -> Seen:
    """A run whose loaders have one position per process, resumed if there is a checkpoint."""
    seen, parallel = Seen(), DdpPlugin()
    parallel.join()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    plugins = [parallel, CheckpointPlugin(every="1 steps", best=None), WitnessPlugin(seen)]
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-2),
        loss=lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(),
        plugins=plugins,
        seed=1,
        out=out,
    )
    engine.resume("auto")
    data = OwnRows(engine.ranks)
    try:
        engine.fit(data, until=f"{steps} steps")
    except NexusError as error:
        seen.reason = str(error)
    seen.weights = [value for p in model.parameters() for value in p.flatten().tolist()]
    return seen


def give_up(sizes: tuple[int, int], stops_at: int | None) -> tuple[str, int, list[str]]:
    """An evaluation with unequal numbers of batches, in which rank 1 may stop at once.

    Returns:
        How the run ended, the number of batches read by this process, and what is still due.
    """
    parallel = DdpPlugin(timeout=20)
    ranks = parallel.join()
    read = 0

    class Long:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            nonlocal read
            for read in range(1, sizes[ranks.rank] + 1):
                if ranks.rank == 1 and read == stops_at:
                    engine.stop("SIGTERM", at_once=True)
                yield {"x": torch.ones(2, 5), "y": torch.ones(2, 4)}

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, plugins=[parallel, SquaredPlugin()], seed=5)
    data = [{"x": torch.ones(2, 5), "y": torch.ones(2, 4)}] * 4
    result = engine.fit(data, until=4, eval_data=Long(), eval_every=2)
    return result.reason or result.status, read, engine.state_dict()["due"]


BUFFERS = {
    "int16": torch.arange(3, dtype=torch.int16),
    "uint16": torch.arange(3).to(torch.uint16),
    "float8": torch.arange(3.0).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
    "number": torch.tensor(3, dtype=torch.int16),
    "empty": torch.empty(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "sliced": torch.arange(6.0)[::2],
    "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
}


def share(*others: str) -> dict[str, list[Any]]:
    """The buffers of a model that differ between processes, after sharing."""
    ranks = DdpPlugin(timeout=20).join()
    dist.barrier()  # the process with the store must not exit before all have joined
    model = nn.Module()
    for name, values in BUFFERS.items():
        model.register_buffer(name, values if ranks.is_main else _zeroed(values))
    for name in others:
        model.register_buffer(name, torch.eye(3).to_sparse())
    share_buffers(model)
    return {name: buffer.to(torch.float32).tolist() for name, buffer in model.named_buffers()}


def _zeroed(values: Tensor) -> Tensor:
    """The same shape, dtype and strides, of zeros."""
    zeros = torch.zeros(values.untyped_storage().nbytes(), dtype=torch.uint8).view(values.dtype)
    return zeros.as_strided(values.shape, values.stride())


class SkippingNet(Net):
    """Skips its hidden layer's bias in its third forward pass, in one process."""

    def forward(self, x: Tensor) -> Tensor:
        self.passes = getattr(self, "passes", 0) + 1
        bias = None if self.passes == 3 and os.environ["RANK"] == "1" else self.hidden.bias
        return self.head(torch.tanh(nn.functional.linear(x, self.hidden.weight, bias)))


def fail_alone() -> str:
    """The error of a run in which one process fails, with its notes."""
    try:
        train(5, net=SkippingNet)
    except Exception as error:
        return "\n".join([f"{type(error).__name__}: {error}", *error.__notes__])
    return ""


def read_apart() -> None:
    """A run whose processes have data of different lengths."""
    parallel = DdpPlugin(timeout=20)
    ranks = parallel.join()
    model = Net()
    batch = {"x": torch.ones(2, 5), "y": torch.ones(2, 4)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, plugins=[parallel, SquaredPlugin()])
    engine.fit([batch] * (3 + ranks.rank), until="2 epochs")


def digests_of_parts() -> tuple[list[int], list[int]]:
    """The digests of whole tensors, and of the same tensors sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from nexus_core.cli.digests import Digester

    dist.init_process_group("gloo")
    cpu, digest, ranks = torch.device("cpu"), Digester(), Ranks.current()
    mesh = init_device_mesh("cpu", (ranks.size,))
    torch.manual_seed(1)
    sizes = [(5, 3), (1, 7), (40_001,), (300, 511), (6, 4)]
    groups = [[torch.randn(size), torch.randn(3)] for size in sizes]
    cuts = [0, 0, 0, 0, 1]  # the last by columns
    divided = [
        [distribute_tensor(one, mesh, [Shard(cut)]), other]
        for (one, other), cut in zip(groups, cuts, strict=True)
    ]
    found = digest(groups, cpu).tolist(), digest(divided, cpu, ranks).tolist()
    dist.destroy_process_group()
    return found
