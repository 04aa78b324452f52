"""The cost and benefit of each training technique: time, memory and loss, with and without it.

    python -m benchmarks.techniques [NAME ...] [--rounds 5] [--seeds 2] [--quick] [--json PATH]

    amp          a step of the whole model with its five losses, in bfloat16 and in float32
    recompute    peak of activation memory and time, at 8 layers and rows of 2,048 tokens
    compile      a step of the backbone, compiled and eager, in both precisions
    cost         a step of the whole model with clip, ema, and each weighting method
    scales       the final values of two loss terms of scales 1:1000, with each weighting method
    quickstart   the preset quickstart_classic with curriculum, ema, lr_wsd and optim_muon

All train with the engine, on random tokens except for the quickstart. The whole model has
vocabulary 32,000, width 256 and 6 layers, and reads rows of 512 tokens. The variants take turns in
one process, in alternating order, so that slow phases of the machine affect all of them; a ratio is
the median over the rounds of the ratio within a round. The first step of each is not counted.

Activation memory is the peak of allocations during one forward and backward pass, from the
profiler's record of every allocation; weights and their gradients exist before.

The quickstart and its variants train 10 steps in turn, and are then evaluated, which is not timed.
The time of a variant is its training time until an evaluation first reached the final result of the
quickstart; the loss after the same number of steps has its own line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.overhead import machine
from nexus_core import Engine, Loss, LossConfig, Plugin
from nexus_core.cli.build import build_plugins, make_engine
from nexus_core.cli.settings import read_settings
from nexus_core.data import RunData
from nexus_core.plan import load
from nexus_plugins.model_nexus import ModelNexusPlugin, NEXUSCore

LOSSES = ("loss_lm", "loss_world", "loss_reason", "loss_energy", "loss_causal")
MODULES = ("world", "reason", "energy", "causal")
FOREVER = "1000000 steps"
EVALUATED_EVERY = 10  # steps of the quickstart
TERMS = ("small", "large")
PLAIN = "quickstart_classic"
WITHOUT_FILES = "no:console,no:jsonl,no:tensorboard,no:checkpoint"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {  # plugins and settings added to the preset
    "curriculum": (
        "curriculum",
        ("curriculum.start_length=64", "curriculum.end_length=512", "curriculum.warmup=70 steps"),
    ),
    "ema": ("ema", ("ema.decay=0.98",)),
    "lr_linear": ("lr_linear", ("lr_linear.warmup=15 steps", "lr_linear.min_lr=0.0003")),
    "lr_rsqrt": ("lr_rsqrt", ("lr_rsqrt.warmup=15 steps",)),
    "lr_wsd": ("lr_wsd", ("lr_wsd.warmup=15 steps", "lr_wsd.min_lr=0.0003")),
    "optim_muon": ("optim_muon", ("optim_muon.lr=0.006", "optim_muon.weight_decay=0.1")),
}

Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Args:
        vocabulary: vocabulary size of the model.
        width: width of the model.
        layers: layers of the backbone.
        rows: rows per batch.
        length: tokens per row.
    """

    vocabulary: int = 32_000
    width: int = 256
    layers: int = 6
    rows: int = 2
    length: int = 512


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Args:
        rounds: rounds of timed comparisons.
        seeds: seeds of runs compared by loss.
        size: sizes of the whole model.
        deep: sizes for measuring memory.
        steps: steps of the problem with two terms.
        quickstart: settings of the quickstart that override the preset.
    """

    rounds: int
    seeds: int
    size: Size = Size()
    deep: Size = Size(layers=8, rows=1, length=2_048)
    steps: int = 400
    quickstart: tuple[str, ...] = ()


TINY = Size(vocabulary=64, width=16, layers=2, rows=1, length=64)
QUICK_QUICKSTART = (
    "until=20 steps",
    "data_text.seq_len=64",
    "data_text.batch_size=2",
    "data_text.valid_limit=512",
    "model_nexus.d_model=32",
    "model_nexus.ssm_head_dim=32",
    "model_nexus.ssm_n_layers=1",
)
QUICK = Scope(2, 1, TINY, replace(TINY, layers=8, length=128), 30, QUICK_QUICKSTART)


@dataclass(frozen=True)
class Row:
    """One measurement with and without a technique.

    Args:
        technique: the plugin, and other conditions.
        what: what was measured.
        unit: unit of the two numbers.
        without: the median without it.
        with_it: the median with it; None if it was never reached.
        ratio: with it divided by without: the median over rounds or seeds.
        at_most: target for the ratio; None: no target.
    """

    technique: str
    what: str
    unit: str
    without: float
    with_it: float | None
    ratio: float | None
    at_most: float | None = None

    @classmethod
    def of(
        cls,
        technique: str,
        what: str,
        unit: str,
        without: Sequence[float],
        with_it: Sequence[float | None],
        at_most: float | None = None,
    ) -> Row:
        """Summarize the numbers of each round or seed."""
        before, there = statistics.median(without), [n for n in with_it if n is not None]
        if len(there) < len(with_it):
            return cls(technique, what, unit, before, None, None, at_most)
        ratio = statistics.median(b / a for a, b in zip(without, there, strict=True))
        return cls(technique, what, unit, before, statistics.median(there), ratio, at_most)

    @property
    def kept(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        return None if self.at_most is None or self.ratio is None else self.ratio <= self.at_most


# -- measurements


def measure_amp(scope: Scope) -> Iterator[Row]:
    """A step in bfloat16 compared with float32; target: 1.6 times as fast."""
    wide, narrow = in_turns(
        {
            "float32": stepping(nexus_engine(scope.size)),
            "bfloat16": stepping(nexus_engine(scope.size, plugin("amp"))),
        },
        scope.rounds,
    ).values()
    yield Row.of("amp", "step, whole model", "s", wide, narrow, at_most=1 / 1.6)


def measure_recompute(scope: Scope) -> Iterator[Row]:
    """Peak activation memory (target: 40% less), and the time it costs."""
    kept, recomputed = (
        [peak_memory(stepping(nexus_engine(scope.deep, *chosen))) / 2**20]
        for chosen in ((), (plugin("recompute"),))
    )
    depth = f"{scope.deep.layers} layers, {scope.deep.length:,} tokens"
    yield Row.of("recompute", f"activations, {depth}", "MB", kept, recomputed, at_most=0.6)
    kept, recomputed = in_turns(
        {
            "kept": stepping(nexus_engine(scope.deep)),
            "recomputed": stepping(nexus_engine(scope.deep, plugin("recompute"))),
        },
        scope.rounds,
    ).values()
    yield Row.of("recompute", f"step, {depth}", "s", kept, recomputed)


def measure_compile(scope: Scope) -> Iterator[Row]:
    """A backbone step compiled, by block and whole, against eager; target: 1.3 times as fast.

    The target applies to the whole over bytes, where the backbone is nearly all of a step. With
    32,000 ids the head and the loss, which are not compiled, are the larger part.
    """
    small = replace(scope.size, vocabulary=min(256, scope.size.vocabulary))
    for precision, narrow in (("float32", False), ("bfloat16", True)):
        yield from _compiled(scope, small, precision, narrow, {"blocks": None, "whole": 1 / 1.3})
        yield from _compiled(scope, scope.size, precision, narrow, {"blocks": None})


def _compiled(
    scope: Scope, size: Size, precision: str, narrow: bool, forms: Mapping[str, float | None]
) -> Iterator[Row]:
    compilers = {form: [plugin("compile", whole=form == "whole")] for form in forms}
    steps = {
        form: stepping(backbone_engine(size, *amp(narrow), *chosen))
        for form, chosen in {"eager": [], **compilers}.items()
    }
    first = {form: [timed(step)] for form, step in steps.items()}
    times = in_turns(steps, scope.rounds)
    for form, limit in forms.items():
        title = f"compile, {form}, {precision}, {size.vocabulary:,} ids"
        yield Row.of(title, "first step", "s", first["eager"], first[form])
        yield Row.of(title, "step, backbone", "s", times["eager"], times[form], at_most=limit)


def measure_cost(scope: Scope) -> Iterator[Row]:
    """A step with each of the small techniques, compared with one without any."""
    names = ("clip", "ema", "weigh_magnitude", "weigh_uncertainty", "weigh_gradnorm", "pcgrad")
    cases = {"none": (), **{name: (plugin(name),) for name in names}}
    steps = {n: stepping(nexus_engine(scope.size, *chosen)) for n, chosen in cases.items()}
    period = load("weigh_gradnorm").config_class.model_fields["every"].default
    seconds = in_turns(steps, scope.rounds, steps=period)
    for name in names:
        yield Row.of(name, f"{period} steps, whole model", "s", seconds["none"], seconds[name])


def measure_scales(scope: Scope) -> Iterator[Row]:
    """The final values of two terms, one a thousand times smaller than the other."""
    ways = ("weigh_magnitude", "weigh_uncertainty", "weigh_gradnorm", "pcgrad")
    static = [left_of_terms(seed, scope.steps) for seed in range(scope.seeds)]
    for way in ways:
        # The default, an update every ten steps, is meant for longer runs.
        settings = {"every": 1} if way == "weigh_gradnorm" else {}
        weighed = [
            left_of_terms(seed, scope.steps, plugin(way, **settings)) for seed in range(scope.seeds)
        ]
        for term in ("small", "large"):
            before, left = ([run[term] for run in runs] for runs in (static, weighed))
            told = f"the {term} term after {scope.steps} steps"
            yield Row.of(way, told, "share of its initial value", before, left)


def measure_quickstart(scope: Scope) -> Iterator[Row]:
    """The quickstart's variants: time to its final loss, and loss after as many steps."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [quickstart_curves(scope, seed, Path(folder)) for seed in range(scope.seeds)]
    plain = [run[PLAIN] for run in runs]
    ends = [curve[-1] for curve in plain]
    for name in VARIANTS:
        curves = [run[name] for run in runs]
        last = [curve[-1].loss for curve in curves]
        told = f"validation loss after {ends[0].step} steps"
        yield Row.of(name, told, "nats", [end.loss for end in ends], last)
        reached = [time_to(end.loss, curve) for end, curve in zip(ends, curves, strict=True)]
        told = "training time to the plain run's final loss"
        yield Row.of(name, told, "s", [end.seconds for end in ends], reached)


MEASURES: dict[str, Callable[[Scope], Iterator[Row]]] = {
    "amp": measure_amp,
    "recompute": measure_recompute,
    "compile": measure_compile,
    "cost": measure_cost,
    "scales": measure_scales,
    "quickstart": measure_quickstart,
}


# -- engines on random tokens


def plugin(name: str, **settings: object) -> Plugin[Any]:
    """Create a plugin by name."""
    return load(name)(**settings)


def amp(wanted: bool) -> list[Plugin[Any]]:
    """Mixed precision, or nothing."""
    return [plugin("amp")] if wanted else []


def nexus_engine(size: Size, *plugins: Plugin[Any]) -> Engine:
    """The whole model with its five losses and AdamW."""
    return _engine(size, MODULES, [*map(plugin, LOSSES), *plugins])


def backbone_engine(size: Size, *plugins: Plugin[Any]) -> Engine:
    """The backbone with the language model's loss and AdamW."""
    return _engine(size, (), [plugin("loss_lm"), *plugins])


def _engine(size: Size, modules: Sequence[str], plugins: Sequence[Plugin[Any]]) -> Engine:
    torch.manual_seed(0)
    model = NEXUSCore(
        vocab_size=size.vocabulary,
        d_model=size.width,
        ssm_n_layers=size.layers,
        ssm_head_dim=min(64, size.width),
        **{name: name in modules for name in MODULES},
    )
    optimizer = KeepingAdamW(model.parameters(), lr=1e-4, fused=True)
    engine = Engine(model, optimizer, plugins=[ModelNexusPlugin(), *plugins], log_every=FOREVER)
    inputs, labels = torch.randint(size.vocabulary, (2, size.rows, size.length))
    engine.data = RunData([{"input_ids": inputs, "labels": labels}])
    return engine


class KeepingAdamW(torch.optim.AdamW):
    """AdamW that zeroes gradients in place, so that a step does not allocate any."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients in place."""
        super().zero_grad(set_to_none)


def stepping(engine: Engine) -> Step:
    """A function that takes one step of the engine per call."""
    loop = engine.steps(until=FOREVER)
    return lambda: next(loop)


def in_turns(cases: Mapping[str, Step], rounds: int, steps: int = 1) -> dict[str, list[float]]:
    """Seconds for some steps of each case, round by round, after one that is not counted."""
    for step in cases.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            seconds[name].append(timed(cases[name], steps))
    return seconds


def timed(step: Step, times: int = 1) -> float:
    """Seconds for a number of calls."""
    begin = time.perf_counter()
    for _ in range(times):
        step()
    return time.perf_counter() - begin


def peak_memory(step: Step) -> int:
    """Peak bytes allocated at any moment of the second step."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    records = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate(int(size) for _, size in records))


# -- two terms of scales 1:1000


class SmallPlugin(Loss[LossConfig]):
    """The squared error of the first target."""

    target, factor = 0, 1.0

    def units(self, batch: Mapping[str, Tensor]) -> float:
        """The rows."""
        return float(len(batch["input"]))

    def loss(self, batch: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """The sum over the rows."""
        error = output[:, self.target] - batch["y"][:, self.target]
        return self.factor * error.square().sum()


class LargePlugin(SmallPlugin):
    """The squared error of the second target, a thousand times as large."""

    target, factor = 1, 1000.0


def left_of_terms(seed: int, steps: int, *plugins: Plugin[Any]) -> dict[str, float]:
    """The remaining share of each term after some steps of plain gradient descent.

    Two targets, functions of eight inputs, through a shared narrow layer; the gradient is clipped
    to norm 1, or the large term would make training diverge.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 8, generator=generator)
    y = torch.tanh(x @ torch.randn(8, 2, generator=generator))
    data = [{"input": a, "y": b} for a, b in zip(x.split(32), y.split(32), strict=True)]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    terms = (SmallPlugin(), LargePlugin(), plugin("clip", max_norm=1.0))
    engine = Engine(model, optimizer, plugins=[*terms, *plugins])
    before = engine.evaluate(data)
    after = engine.fit(data, until=steps, eval_data=data).metrics
    return {name: after[f"val/{name}_loss"] / before[f"val/{name}_loss"] for name in TERMS}


# -- the quickstart and its variants


@dataclass(frozen=True)
class Point:
    """A run's progress and loss at an evaluation."""

    step: int
    seconds: float
    loss: float


class Racer:
    """One run of the quickstart, a few steps at a time; only training is timed.

    Args:
        plugins: plugins added to the preset, as in `--plugins`.
        sets: changed settings, as in `--set`.
        out: the run folder.
    """

    def __init__(self, plugins: str, sets: tuple[str, ...], out: Path) -> None:
        build = build_plugins(read_settings(PLAIN, f"{WITHOUT_FILES},{plugins}", sets))
        self._engine = make_engine(build, out)
        self._loop = self._engine.steps(until=build.run.until, eval_data={})
        self._seconds = 0.0

    def race(self, steps: int) -> Point | None:
        """Train for some steps and evaluate; None if the run has ended."""
        before = self._engine.state.step
        self._seconds += timed(lambda: list(islice(self._loop, steps)))
        if self._engine.state.step == before or self._engine.data is None:
            return None
        metrics = self._engine.evaluate(self._engine.data.valid)
        return Point(self._engine.state.step, self._seconds, metrics["val/loss"])


def quickstart_curves(scope: Scope, seed: int, folder: Path) -> dict[str, list[Point]]:
    """Train the quickstart and its variants in turns of ten steps."""
    common = (f"seed={seed}", *scope.quickstart)
    racers = {
        name: Racer(plugins, (*common, *sets), folder / f"{name}-{seed}")
        for name, (plugins, sets) in {PLAIN: ("", ()), **VARIANTS}.items()
    }
    curves: dict[str, list[Point]] = {name: [] for name in racers}
    while True:
        for name, racer in racers.items():
            if (point := racer.race(EVALUATED_EVERY)) is None:
                return curves
            curves[name].append(point)


def time_to(loss: float, curve: Sequence[Point]) -> float | None:
    """The seconds until a run first reached a loss; None if it never did."""
    return next((point.seconds for point in curve if point.loss <= loss), None)


# -- output


def show(rows: Sequence[Row], judged: bool) -> None:
    """Print the machine, and the table as Markdown."""
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"vector units {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    print("\n| technique | what | without | with | with / without | target |")
    print("|---|---|---:|---:|---:|---|")
    for row in rows:
        asked = "" if row.at_most is None else f"at most {row.at_most:.2f}"
        asked += ", missed" if judged and row.kept is False else ""
        numbers = (_number(row.without), _number(row.with_it), _number(row.ratio))
        print(f"| {row.technique} | {row.what}, {row.unit} | {' | '.join(numbers)} | {asked} |")


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON on request; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.techniques", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timed comparisons")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of runs compared by loss")
    parser.add_argument("--quick", action="store_true", help="too small to judge: no exit 1")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if strangers := sorted(set(options.names) - MEASURES.keys()):
        parser.error(
            f"no such measurement: {', '.join(strangers)}; there are {', '.join(MEASURES)}"
        )
    if min(options.rounds, options.seeds) < 1:
        parser.error("--rounds and --seeds must be at least 1")
    scope = QUICK if options.quick else Scope(options.rounds, options.seeds)
    rows = [row for name in options.names or MEASURES for row in MEASURES[name](scope)]
    show(rows, judged=not options.quick)
    if options.json:
        results = {"machine": machine(), "scope": asdict(scope), "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if options.quick or all(row.kept is not False for row in rows) else 1)


if __name__ == "__main__":
    main()
