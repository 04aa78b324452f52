"""Twenty planted differences, found by `nexus-run diff`; equal runs; and honest runs, audited.

    python -m benchmarks.differences [--tries 100] [--honest 100] [--only KIND]

Each run has sixteen steps of a small model. A difference is planted at step 11: by a plugin of the
run (like a bug in user code), by its settings, or from outside, invisible in any config (like a
hardware fault).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
import yaml

from nexus_core import Engine
from nexus_core.cli.build import build_plugins, make_engine
from nexus_core.cli.folder import RunFolder
from nexus_core.cli.session import train
from nexus_core.cli.settings import read_settings
from nexus_core.sources import forget
from nexus_plugins.tape.again import Recorded
from nexus_plugins.tape.audit import audit
from nexus_plugins.tape.diff import Finding, diff

STEPS, AT, SAVED = 16, 11, 4

WORLD = '''
"""A small run in which a difference can be planted at one step."""
import math

import numpy as np
import torch
from torch import nn

from nexus_core import Loss, LossConfig, Plugin, PluginConfig, ResumableLoader, RunData, hookimpl


class Rows:
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(96, 16, generator=generator)

    def __len__(self):
        return 96

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.x[index, :4].sin(), "row": torch.tensor(index)}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, 64)
        self.outer = nn.Linear(64, width)
        self.drop = nn.Dropout(0.1)
        self.approximate, self.dtype = "none", None

    def forward(self, x):
        h = self.inner(self.norm(x).to(self.dtype or x.dtype).to(x.dtype))
        return x + self.drop(self.outer(nn.functional.gelu(h, approximate=self.approximate)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.scale, self.head = Scale(), nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.scale(x))


class Scale(nn.Module):
    """Multiplies by a number that depends on the step, cached for the step."""

    cached = None

    def forward(self, x):
        return x * (1.0 if self.cached is None else self.cached)


class WorldPlugin(Loss[LossConfig]):
    constant = 1.0

    @hookimpl
    def make_data(self, engine):
        rows = Rows()
        held_out = [{name: value[None] for name, value in rows[0].items()}]
        return RunData(ResumableLoader(rows, 8, seed=engine.seed), {"val": held_out})

    @hookimpl
    def make_model(self):
        return Net()

    @hookimpl
    def on_batch(self, engine):
        engine.model.scale.cached = 1.0 + engine.state.step / 1000

    @hookimpl
    def forward(self, engine, batch):
        return engine.model(batch["x"])

    def units(self, batch):
        return float(len(batch["x"]))

    def loss(self, batch, output):
        return (output - batch["y"] * self.constant).square().sum()


class DecayPlugin(Loss[LossConfig]):
    """A second term: large sums, which are split over threads."""

    def units(self, batch):
        return 1.0

    def loss(self, batch, output):
        return (output.sum() * torch.linspace(0, 1e-3, 400_000)).sin().sum() * 1e-4


class HalvePlugin(Plugin[PluginConfig]):
    """Scales gradients down, so its order relative to clipping matters."""

    @hookimpl
    def after_backward(self, engine):
        for parameter in engine.parameters():
            parameter.grad.mul_(0.7)


class CapPlugin(Plugin[PluginConfig]):
    @hookimpl
    def after_backward(self, engine):
        for parameter in engine.parameters():
            parameter.grad.clamp_(-0.01, 0.01)


class PlantConfig(PluginConfig):
    kind: str = "nothing"
    step: int = 0


class PlantPlugin(Plugin[PlantConfig]):
    """Does something different at one step."""

    def due(self, kind, number):
        return self.config.kind == kind and number == self.config.step

    @hookimpl
    def on_batch(self, engine, batch):
        number, model = engine.state.step + 1, engine.model
        if self.due("rows", number):
            order = torch.tensor([1, 0, *range(2, len(batch["x"]))])
            return {name: value[order] for name, value in batch.items()}
        if self.due("label", number):
            batch["y"] = batch["y"] + (torch.arange(8)[:, None] == 3) * 1e-3
        if self.due("numpy", number):
            np.random.rand()
        if self.due("torch", number):
            torch.rand(1)
        if self.due("cache", number):
            model.scale.cached = 1.0 + (number - 2) / 1000
        block = model.blocks[1]
        block.drop.p = 0.3 if self.due("dropout", number) else 0.1
        block.approximate = "tanh" if self.due("gelu", number) else "none"
        model.blocks[2].dtype = torch.bfloat16 if self.due("dtype", number) else None
        engine.plugins["world"].constant = 1.0001 if self.due("constant", number) else 1.0
        return None

    @hookimpl(wrapper=True)
    def weigh_losses(self, step):
        weights = yield
        return {**weights, "decay": 1.001} if self.due("weight", step.number) else weights

    @hookimpl(stage="transform")
    def after_backward(self, engine, step):
        if self.due("gradient", step.number):
            engine.model.blocks[0].outer.weight.grad[3, 5] *= 1.001

    @hookimpl
    def lr_scale(self, engine):
        return 1.0001 if self.due("rate", engine.state.step + 1) else 1.0

    @hookimpl
    def on_step(self, engine, step):
        if self.due("update", step.number):
            engine.model.blocks[2].inner.bias.data[0] += 1e-6
'''


def flip(tensor: torch.Tensor) -> None:
    """Flip the last bit of one number, as a cosmic ray might."""
    tensor.detach().view(-1).view(torch.int32)[7] ^= 1


def exchange(tensor: torch.Tensor) -> None:
    """Swap two numbers."""
    flat = tensor.detach().view(-1)
    flat[[2, 9]] = flat[[9, 2]].clone()


@dataclass(frozen=True)
class Planted:
    """A planted difference, and the expected result of `diff`.

    Args:
        step: the first step that differs.
        phases: acceptable names of the phase.
        module: the expected module, or a part of its name.
        block: changes to the config of run B.
        outside: the moment of step 11, and the action from outside.
        threads: threads of run B.
    """

    phases: tuple[str, ...]
    module: str
    step: int = AT
    change: Callable[[dict[str, Any]], Any] = field(default=lambda config: None)
    outside: tuple[str, Callable[[Engine], Any]] | None = None
    threads: int = 1


def plant(kind: str) -> Callable[[dict[str, Any]], Any]:
    """Plant a difference with the plugin of run B."""
    return lambda config: config["plugins"].update(
        {"./world.py:PlantPlugin": {"kind": kind, "step": AT}}
    )


def reordered(config: dict[str, Any]) -> None:
    """Swap two plugins."""
    plugins = config["plugins"]
    plugins["./world.py:HalvePlugin"] = plugins.pop("./world.py:HalvePlugin")


def optimizer(engine: Engine) -> torch.Tensor:
    """A momentum tensor of the middle block."""
    return engine.optimizer.state[engine.model.blocks[1].inner.weight]["exp_avg"]


PLANTED: Mapping[str, Planted] = {
    "rows exchanged": Planted(("batch",), "x", change=plant("rows")),
    "a label": Planted(("batch",), "y", change=plant("label")),
    "numpy's generator": Planted(("generators",), "numpy", change=plant("numpy")),
    "torch's generator": Planted(("generators",), "torch", change=plant("torch")),
    "dropout": Planted(("forward",), "blocks.1", change=plant("dropout")),
    "another gelu": Planted(("forward",), "blocks.1", change=plant("gelu")),
    "a dtype": Planted(("forward",), "blocks.2", change=plant("dtype")),
    "a stale cache": Planted(("forward",), "scale", change=plant("cache")),
    "a constant in a loss": Planted(("forward", "loss"), "world", change=plant("constant")),
    "the weight of a loss": Planted(("loss",), "decay", change=plant("weight")),
    "a gradient": Planted(("gradient",), "blocks.0", change=plant("gradient")),
    "a rate": Planted(("settings",), "", change=plant("rate")),
    "after the update": Planted(("update",), "blocks.2", change=plant("update")),
    "order of plugins": Planted(("gradient",), "", step=1, change=reordered),
    "weight decay": Planted(
        ("settings",), "", step=1,
        change=lambda c: c["plugins"]["optim_adamw"].update(weight_decay=0.02),
    ),
    "number of threads": Planted(("forward", "loss"), "decay", step=1, threads=2),
    "a row, unseen": Planted(
        ("batch",), "",
        outside=("before", lambda e: e.data.train.dataset.x[:, 0].add_(1e-3)),
    ),
    "a bit of a weight, unseen": Planted(
        ("update",), "blocks.1", outside=("after", lambda e: flip(e.model.blocks[1].inner.weight))
    ),
    "weights exchanged, unseen": Planted(
        ("update",), "head", outside=("after", lambda e: exchange(e.model.head.weight))
    ),
    "a bit of the optimizer, unseen": Planted(
        ("update",), "blocks.1", outside=("after", lambda e: flip(optimizer(e)))
    ),
}  # fmt: skip


def config() -> dict[str, Any]:
    """The config of run A."""
    return {
        "until": f"{STEPS} steps",
        "seed": 3,
        "log_every": "4 steps",
        "device": "cpu",
        "plugins": {
            "./world.py:WorldPlugin": {},
            "./world.py:DecayPlugin": {},
            "./world.py:HalvePlugin": {},
            "./world.py:CapPlugin": {},
            "./world.py:PlantPlugin": {},
            "optim_adamw": {"lr": 0.01},
            "checkpoint": {"every": f"{SAVED} steps"},
            "tape": {},
            "jsonl": {},
        },
    }


def make(folder: Path, name: str, planted: Planted | None = None) -> Path:
    """Make a run, with a planted difference."""
    settings = config()
    if planted is not None:
        planted.change(settings)
    (folder / "world.py").write_text(WORLD)
    source, out = folder / f"{name}.yaml", folder / name
    source.write_text(yaml.safe_dump(settings, sort_keys=False))
    with threads(planted.threads if planted else 1):
        made = build_plugins(read_settings(str(source), values={"out": out}))
        engine = make_engine(made, out)
        if planted is not None and planted.outside is not None:
            _meddle(engine, *planted.outside)
        train(engine, made.run, None, RunFolder(out), quiet=True)
    forget()  # the next run has a file of the same name
    return out


def _meddle(engine: Engine, moment: str, deed: Callable[[Engine], Any]) -> None:
    """Interfere at one step from outside, without a trace in the config."""
    hook = "on_batch" if moment == "before" else "optimizer_step"
    inner = getattr(engine.hook, hook)

    def before(**given: Any) -> Any:
        return inner(**given)

    if moment == "before":
        steps = engine.hook.on_step

        def at_end(*, engine: Engine, step: Any) -> Any:
            answer = steps(engine=engine, step=step)
            if step.number == AT - 1:
                deed(engine)
            return answer

        vars(engine.hook)["on_step"] = at_end
        return

    def after(*, engine: Engine, step: Any, again: Any) -> Any:
        answer = inner(engine=engine, step=step, again=again)
        if step.number == AT:
            deed(engine)
        return answer

    vars(engine.hook)[hook] = after


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set torch's thread count within a context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compared(one: Path, other: Path) -> Finding:
    """Run `nexus-run diff --trust`."""
    return diff(Recorded.at(one, trust=True), Recorded.at(other, trust=True))


def verdict(planted: Planted, found: Finding) -> tuple[bool, bool]:
    """Whether the step is right, and whether phase and module are right."""
    named = found.phase in planted.phases and planted.module in f"{found.module} {found.tensor}"
    return found.step == planted.step, named


@click.command()
@click.option("--tries", default=100, help="Number of pairs of equal runs.")
@click.option("--honest", default=100, help="Number of intervals of honest runs to audit.")
@click.option("--only", default="", help="Only planted differences whose name contains this.")
def main(tries: int, honest: int, only: str) -> None:
    """Print what was found for each."""
    torch.set_num_threads(1)
    chosen = {name: planted for name, planted in PLANTED.items() if only in name}
    steps = names = 0
    with TemporaryDirectory() as room:
        folder = Path(room)
        plain = make(folder, "a")
        for number, (name, planted) in enumerate(chosen.items()):
            begun = time.monotonic()
            found = compared(plain, make(folder, f"b{number}", planted))
            right = verdict(planted, found)
            steps, names = steps + right[0], names + right[1]
            click.echo(
                f"{name:32} step {found.step} {'ok ' if right[0] else 'NO '} {found.phase}, "
                f"{found.module}, {found.tensor} {'ok' if right[1] else 'NO'}, "
                f"{found.largest} ({time.monotonic() - begun:.1f} s)\n    {found.cause}"
            )
        click.echo(f"{len(chosen)} planted: step right {steps}, phase and module right {names}")
        wrong = 0
        for number in range(tries):
            found = compared(plain, make(folder, f"same{number}"))
            wrong += not found.equal or bool(found.facts)
        click.echo(f"{tries} equal pairs: {wrong} reported as different")
        accused = audited(folder, honest) if honest else 0
        click.echo(f"{honest} honest intervals: {accused} with faults found")
    missed = steps < len(chosen) or names < len(chosen) - 2
    sys.exit(1 if missed or wrong or accused else 0)


def audited(folder: Path, intervals: int) -> int:
    """The number of intervals of an honest run in which an audit finds faults."""

    def longer(config: dict[str, Any]) -> None:
        config["until"] = f"{intervals} steps"
        config["plugins"]["checkpoint"] |= {"every": "1 steps", "keep_last": intervals}

    out = make(folder, "honest", Planted((), "", change=longer))
    report = audit(Recorded.at(out, trust=True), intervals)
    assert len(report.intervals) == intervals
    for part in report.intervals:
        click.echo("\n".join(part.faults), nl=bool(part.faults))
    return sum(bool(part.faults) for part in report.intervals) + len(report.faults)


if __name__ == "__main__":
    main()
