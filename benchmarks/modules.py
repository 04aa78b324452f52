"""What each module achieves on a task that needs it, compared with alternatives.

    python -m benchmarks.modules [TASK ...] [--seeds 3] [--set length=256] [--json PATH]

The variants of a task: the backbone with the module; the backbone without it, widened to the same
number of parameters; the backbone with a plain MLP of as many parameters in place of the module;
and the published designs that the task names. All see the same rows in the same order, with AdamW
at one constant learning rate after a warm-up, so that a run can be evaluated at any step.

Equal steps: the measures on held-out rows after the task's number of steps. Equal time: the
measures after the CPU time that the variant with the module needed for its steps; faster variants
train longer. Each seed is a single-threaded process that draws its own task (rules, hidden
processes), rows and weights. Differences are taken within a seed; the error is the standard
deviation over seeds divided by the root of their number.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import tasks
from benchmarks.tasks.task import Batch, Sizes, Task, Variant, trained
from nexus_core import Engine
from nexus_core.plan import load


@dataclass
class Run:
    """One variant under one seed."""

    task: str
    variant: str
    seed: int
    parameters: int
    steps: int
    milliseconds: float
    """CPU milliseconds per step."""
    equal_steps: dict[str, float]
    steps_in_equal_time: int
    equal_time: dict[str, float]


class Rows:
    """The training data of a seed, and the time to generate it, which counts for no variant."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed, self.seconds = task, seed, 0.0

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while True:
            begin = time.process_time()
            batch = self.task.batch(self.seed, step)
            self.seconds += time.process_time() - begin
            yield batch
            step += 1


class Contender:
    """A variant in training."""

    def __init__(
        self, task: Task, variant: Variant, sizes: Sizes, seed: int, parameters: tuple[int, int]
    ) -> None:
        torch.manual_seed(seed)
        self.task, self.model = task, variant.build(task, sizes, *parameters)
        plugins = [
            load("model_nexus")(),
            *variant.plugins(),
            load("optim_adamw")(lr=task.lr, weight_decay=0.01),
            load("lr_constant")(warmup=20),
            load("clip")(),
        ]
        self._rows = Rows(task, seed)
        self._held_out = task.held_out(seed)
        engine = Engine(self.model, plugins=plugins, seed=seed, log_every=10**9)
        self._training = engine.steps(self._rows, until="1M steps")
        self.steps, self.seconds = 0, 0.0

    def step(self) -> None:
        """Train one step, and count its time."""
        begin, made = time.process_time(), self._rows.seconds
        next(self._training)
        self.seconds += time.process_time() - begin - (self._rows.seconds - made)
        self.steps += 1

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The current measures of the task."""
        self.model.eval()
        seen = [
            (batch, self.model.hidden(batch["input_ids"], batch.get("segment_ids")))
            for batch in self._held_out
        ]
        beside = self.task.timed(self.model, self._rows.seed)
        self.model.train()
        return self.task.measure(seen) | beside


def compete(seed: int, task: Task, sizes: Sizes, only: frozenset[str]) -> list[Run]:
    """Train the variants with one seed, the module's first: it sets the others' time budget."""
    torch.set_num_threads(1)
    first, *others = task.variants()
    bare = trained(replace(others[0], widened=False).build(task, sizes, 0, 0))
    whole = trained(first.build(task, sizes, 0, 0))
    runs: list[Run] = []
    budget: float | None = None
    for variant in (first, *others):
        if only and variant is not first and variant.name not in only:
            continue
        contender = Contender(task, variant, sizes, seed, (whole, whole - bare))
        runs.append(_raced(contender, variant, seed, budget))
        if variant is first:
            budget = contender.seconds
        print(_line(runs[-1]), flush=True)
    return runs


def _raced(contender: Contender, variant: Variant, seed: int, budget: float | None) -> Run:
    """Train until both the task's steps and the time budget, if any, are used up."""
    steps = contender.task.steps
    after_steps: dict[str, float] = {}
    in_time: tuple[int, dict[str, float]] | None = None
    while contender.steps < steps or (budget is not None and in_time is None):
        contender.step()
        if contender.steps == steps:
            after_steps = contender.measure()
        if in_time is None and budget is not None and contender.seconds >= budget:
            in_time = (contender.steps, contender.measure())
    steps_in_time, after_time = in_time or (steps, after_steps)
    return Run(
        task=contender.task.name,
        variant=variant.name,
        seed=seed,
        parameters=trained(contender.model),
        steps=steps,
        milliseconds=1000 * contender.seconds / contender.steps,
        equal_steps=after_steps,
        steps_in_equal_time=steps_in_time,
        equal_time=after_time,
    )


def _line(run: Run) -> str:
    def shown(measures: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in measures.items())

    return (
        f"{run.task} seed {run.seed} {run.variant}: {run.parameters:,} parameters, "
        f"{run.milliseconds:.0f} ms; {run.steps} steps: {shown(run.equal_steps)}; "
        f"{run.steps_in_equal_time} steps: {shown(run.equal_time)}"
    )


def table(runs: list[Run], module: str) -> str:
    """One task's result as a Markdown table; differences are the module's minus the row's."""
    best = {run.seed: run for run in runs if run.variant == module}
    lines = [
        "| variant | parameters | time per step | equal steps: nats | module minus it "
        "| equal time: nats | module minus it | other measures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == variant]
        pace = statistics.mean(run.milliseconds / best[run.seed].milliseconds for run in mine)
        cells = [variant, f"{mine[0].parameters:,}", f"{pace:.2f}"]
        for moment in ("equal_steps", "equal_time"):
            nats = [getattr(run, moment)["nats"] for run in mine]
            cells.append(f"{statistics.mean(nats):.3f} ± {_spread(nats):.3f}")
            cells.append(difference(runs, module, variant, moment))
        names = [name for name in mine[0].equal_steps if name != "nats"]
        cells.append(
            ", ".join(
                f"{name} {statistics.mean(run.equal_steps[name] for run in mine):.3f}"
                for name in names
            )
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(runs: list[Run], module: str, variant: str, moment: str) -> str:
    """The module's nats minus those of a variant, with the standard error over the seeds."""
    if variant == module:
        return ""
    of = {(run.variant, run.seed): getattr(run, moment)["nats"] for run in runs}
    seeds = [seed for name, seed in of if name == variant and (module, seed) in of]
    changes = [of[module, seed] - of[variant, seed] for seed in seeds]
    mean, error = statistics.mean(changes), _spread(changes) / len(changes) ** 0.5
    errors = f", {abs(mean) / error:.1f} errors" if error else ""
    return f"{mean:+.3f} ± {error:.3f}{errors}"


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def found() -> dict[str, type[Task]]:
    """The tasks by name: the `TASK` of every file next to `task.py`."""
    names = [info.name for info in pkgutil.iter_modules(tasks.__path__) if info.name != "task"]
    kinds = [importlib.import_module(f"benchmarks.tasks.{name}").TASK for name in names]
    return {kind.name: kind for kind in kinds}


def changed(task: Task, settings: list[str], parser: argparse.ArgumentParser) -> Task:
    """The task with fields changed by `name=value`, for fields that it has."""
    kinds = {field.name: type(getattr(task, field.name)) for field in fields(task)}
    given = dict(setting.split("=", 1) for setting in settings)
    if unknown := given.keys() - kinds.keys():
        parser.error(f"{task.name} has no {sorted(unknown)}; it has {sorted(kinds)}")
    return replace(task, **{name: kinds[name](value) for name, value in given.items()})


def main(arguments: list[str] | None = None) -> None:
    """Run the variants, print a table for each task, and write the runs as JSON on request."""
    known = found()
    parser = argparse.ArgumentParser(prog="benchmarks.modules", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds run in parallel")
    parser.add_argument("--variants", nargs="+", default=[], help="only these, and the module's")
    parser.add_argument("--set", nargs="+", default=[], help="task fields, such as length=256")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the runs to this file")
    options = parser.parse_args(arguments)
    if unknown := set(options.tasks) - known.keys():
        parser.error(f"no task {sorted(unknown)}; there are {', '.join(known)}")
    sizes = Sizes(options.width, options.layers, options.state)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs: list[Run] = []
    for name in options.tasks or known:
        task = changed(known[name](), options.set, parser)
        of_seed = partial(compete, task=task, sizes=sizes, only=frozenset(options.variants))
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            mine = [run for done in pool.imap(of_seed, seeds) for run in done]
        runs += mine
        print(f"\n{name}: {task}\n\n{table(mine, task.module)}\n", flush=True)
        if options.json:
            text = json.dumps([asdict(run) for run in runs], indent=2)
            options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
