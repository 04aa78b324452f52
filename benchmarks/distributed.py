"""The cost of `ddp` compared with plain DistributedDataParallel, and the cost of tree sums.

    python -m benchmarks.distributed [--rounds 5] [--problems nexus small] [--sizes 2 4]
        [--cells 8] [--cases ours tree] [--memory] [--json PATH]

All cases train the same network (AdamW, cross-entropy, gradients clipped) on the same global batch,
with one thread per process. Problems:

    nexus     the backbone of the quickstart on 4,096 bytes per step; its ratio is the result
    small     four linear layers and 64 rows: a step takes milliseconds, so every message counts
    large     50 million parameters in 12 linear layers, and 64 rows: little compute, much traffic

and cases:

    alone     our engine in one process
    ours      our engine with `ddp`, the batch divided among the processes
    tree      the same with one cell per process (`cells`), bitwise independent of their number
    cells     the same with `--cells` cells, bitwise equal on any number of processes up to it
    by hand   a plain PyTorch loop around DistributedDataParallel
    fsdp      our engine with `fsdp`, on request
    fsdp tree the same with one cell per process

All cases but the first run in the same processes, with interleaved steps in alternating order, so
that other load affects all alike. A round is the median wall time of a step on rank 0; the table
has the median over the rounds, and the median, minimum and maximum of the ratio within a round. The
trained weights of the cases are compared at the end: they must have done the same work.

With `--memory` each case then takes four steps in its own processes, and the table has the peak
resident memory of each process, next to that of a process that only has the model.

On a machine whose cores the case `alone` already uses, two processes cannot be twice as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from nexus_core import Engine, Plugin
from nexus_core.cells import Cells, edges
from nexus_core.cli.memory import peak_resident
from nexus_core.processes import whole
from nexus_plugins._shared.cell_sums import nodes_of
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.model_nexus import NEXUSCore
from nexus_plugins.optim_adamw import OptimAdamwPlugin

MAX_NORM, WARMUP = 0.5, 3
CASES = ("ours", "tree", "cells", "by hand")
ON_DEMAND = ("fsdp", "fsdp tree")
MOST_OVER_HAND = 1.03
Batch = tuple[Tensor, Tensor]
Times = list[float]
Runs = dict[str, tuple[Callable[..., Iterator[object]], int]]


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Args:
        model: builds the model, always with the same weights.
        batch: draws a global batch.
        steps: steps per round.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    steps: int


def backbone() -> nn.Module:
    """The state-space layers of the quickstart, over bytes."""
    modules = dict.fromkeys(("world", "reason", "energy", "causal"), False)
    return NEXUSCore(vocab_size=256, d_model=128, ssm_n_layers=4, **modules)


def bytes_to_predict(generator: torch.Generator) -> Batch:
    """8 rows of 512 bytes, and the next byte of each."""
    rows = torch.randint(256, (8, 513), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def linear_layers(width: int = 512, classes: int = 10, deep: int = 3) -> nn.Module:
    """This many hidden layers and an output layer, over rows of 512 numbers."""
    first = [] if width == 512 else [nn.Linear(512, width)]
    layers = [module for _ in range(deep) for module in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*first, *layers, nn.Linear(width, classes))


def points_to_sort(generator: torch.Generator, rows: int = 64) -> Batch:
    """Rows of 512 numbers, with a class for each."""
    points = torch.randn(rows, 512, generator=generator)
    return points, torch.randint(10, (rows,), generator=generator)


PROBLEMS = {
    "nexus": Problem(backbone, bytes_to_predict, steps=15),
    "small": Problem(linear_layers, points_to_sort, steps=60),
    "large": Problem(lambda: linear_layers(2048, deep=12), points_to_sort, steps=12),
}


class Feed:
    """This rank's share of ready batches, in cells if the run has them."""

    def __init__(self, problem: Problem, rank: int, size: int, cells: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        batches = [problem.batch(generator) for _ in range(8)]
        bounds = edges(len(batches[0][0]), cells or size)
        low, high = edges(cells or size, size)[rank : rank + 2]
        parts = [slice(*bounds[cell : cell + 2]) for cell in range(low, high)]
        self.ready: list[Any] = []
        for inputs, labels in batches:
            cut = tuple((inputs[part], labels[part]) for part in parts)
            rows = tuple(len(rows) for rows, _ in cut)
            self.ready.append(Cells(cut, rows, low, cells) if cells else cut[0])
        self.steps = problem.steps

    def in_cells(self, count: int) -> Feed:
        """Does nothing: the data is in cells already."""
        return self

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return (self.ready[place % len(self.ready)] for place in range(self.steps))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over this rank's rows."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def by_engine(
    model: nn.Module, feed: Feed, cells: int | None = None, *, sharded: bool = False
) -> Iterator[object]:
    """Our engine, with `ddp` or `fsdp` if there are several ranks; yields after each step."""
    plugins: list[Plugin[Any]] = [ClipPlugin(max_norm=MAX_NORM)]
    optimizer = None if sharded else AdamW(model.parameters(), fused=True)
    if sharded:
        plugins += [FsdpPlugin(), OptimAdamwPlugin(lr=1e-3)]
    elif dist.is_initialized():
        plugins.append(DdpPlugin())
    engine = Engine(model, optimizer, loss=loss_of, plugins=plugins, cells=cells)
    yield from engine.steps(feed, until=len(feed))


def by_hand(model: nn.Module, feed: Feed) -> Iterator[object]:
    """Plain PyTorch calls; yields after each step."""
    parallel = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), fused=True)
    for step, batch in enumerate(feed, start=1):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(parallel, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        if step % 10 == 0:
            loss.item()
        yield step


def runs_of(chosen: Sequence[str], size: int, cells: int) -> Runs:
    """The function that runs each case, and its number of cells."""
    if size == 1:
        return {"ours": (by_engine, 0)}
    runs: Runs = {
        "ours": (by_engine, 0),
        "tree": (by_engine, size),
        "cells": (by_engine, cells),
        "by hand": (by_hand, 0),
        "fsdp": (partial(by_engine, sharded=True), 0),
        "fsdp tree": (partial(by_engine, sharded=True), size),
    }
    return {name: run for name, run in runs.items() if name in chosen}


def ranks_here() -> tuple[int, int]:
    """The rank of this process, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def peaks(problem: Problem, case: str, cells: int) -> Times:
    """Peak resident memory of each process in a few steps of a case, in bytes."""
    rank, size = ranks_here()
    model = problem.model()
    if case != "model":
        run, cut = runs_of([case], size, cells)[case]
        steps = run(model, Feed(problem, rank, size, cut), *([cut] if cut else []))
        for _ in range(4):
            next(steps)
    found = torch.zeros(size, dtype=torch.float64)
    found[rank] = float(peak_resident())
    if size > 1:
        dist.all_reduce(found)
    return found.tolist()


def measure(problem: Problem, rounds: int, cells: int, chosen: Sequence[str]) -> dict[str, Times]:
    """Seconds per step in each round, by case."""
    rank, size = ranks_here()
    cases = runs_of(chosen, size, cells)
    found: dict[str, Times] = {name: [] for name in cases}
    for _ in range(rounds):
        models = {}
        for name in cases:
            torch.manual_seed(0)
            models[name] = problem.model()
        runs = {
            name: run(models[name], Feed(problem, rank, size, cut), *([cut] if cut else []))
            for name, (run, cut) in cases.items()
        }
        times: dict[str, Times] = {name: [] for name in cases}
        for step in range(problem.steps):
            for name in list(runs)[:: 1 if step % 2 else -1]:
                begin = time.perf_counter()
                next(runs[name])
                times[name].append(time.perf_counter() - begin)
        for name, run in runs.items():
            list(run)  # to its end, where it releases its resources
            found[name].append(statistics.median(times[name][WARMUP:]))
        if size > 1:
            one, *others = (list(map(whole, models[name].parameters())) for name in cases)
            for other in others:
                torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    return found


def in_processes(
    size: int, problem: str, rounds: int, cells: int, cases: Sequence[str], memory: bool = False
) -> dict[str, Times]:
    """Run `measure`, or `peaks` for one case, in several processes under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "-m", "benchmarks.distributed", "--rounds", str(rounds), "--problems", problem,
            "--cells", str(cells), "--worker", str(path), *(["--memory"] if memory else []),
            "--cases", *cases,
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        times: dict[str, Times] = json.loads(path.read_text())
        return times


def work(path: Path, problem: Problem, options: argparse.Namespace) -> None:
    """In a process of the launcher: measure; rank 0 writes the result."""
    torch.set_num_threads(1)
    DdpPlugin().join()
    if options.memory:
        (case,) = options.cases
        found = {case: peaks(problem, case, options.cells)}
    else:
        found = measure(problem, options.rounds, options.cells, options.cases)
    if int(os.environ["RANK"]) == 0:
        path.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def compare(problem: str, size: int, found: dict[str, Times], cells: int) -> float:
    """Print the cases for a number of processes; returns ours over the handwritten loop."""
    numbers = sum(p.numel() for p in PROBLEMS[problem].model().parameters())
    ring = 2 * (size - 1) / size
    parts = nodes_of([cells], cells, size)
    even = len({len(there) for there in parts}) == 1 and size & (size - 1) == 0
    most = max(map(len, parts))
    tree = ring if even and most == 1 else (most + 1) * (size - 1) / size
    sent = {"cells": tree, **dict.fromkeys(ON_DEMAND, 1.5 * ring)}  # weights twice, gradients once
    for name, times in found.items():
        megabytes = 4 * numbers * sent.get(name, ring) / 2**20
        print(
            f"{problem:<7} {size} {name:<8} {1e3 * statistics.median(times):8.2f} ms per step, "
            f"{megabytes:6.1f} MiB sent by each"
        )
    over = 0.0
    for name, other in (
        ("ours", "by hand"),
        ("tree", "ours"),
        ("cells", "ours"),
        ("fsdp tree", "fsdp"),
    ):
        if name not in found or other not in found:
            continue
        ratios = [a / b for a, b in zip(found[name], found[other], strict=True)]
        middle = statistics.median(ratios)
        over = over or middle
        print(
            f"{problem:<7} {size} {name} / {other}: {middle:.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return over


def show_peaks(problem: str, size: int, options: argparse.Namespace) -> dict[str, Times]:
    """Print the peak memory of each case."""
    found: dict[str, Times] = {}
    for case in ["model", *options.cases]:
        found |= in_processes(size, problem, 1, options.cells, [case], memory=True)
        each = ", ".join(f"{peak / 2**20:.0f}" for peak in found[case])
        print(f"{problem:<7} {size} {case:<8} peak resident memory, in MiB: {each}")
    return found


def main() -> None:
    """Measure, print a table for each problem, and fail where we are slower than allowed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[2])
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument(
        "--cases", nargs="+", choices=(*CASES, *ON_DEMAND, "model"), default=list(CASES)
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, PROBLEMS[options.problems[0]], options)
        return
    results: dict[str, dict[str, Times | float]] = {}
    slower = False
    for problem in options.problems:
        shared = problem, options.rounds, options.cells, options.cases
        alone = in_processes(1, *shared)["ours"]
        print(f"{problem:<7} alone      {1e3 * statistics.median(alone):8.2f} ms a step")
        for size in options.sizes:
            found = in_processes(size, *shared)
            over = compare(problem, size, found, options.cells)
            speed = statistics.median(alone) / statistics.median(next(iter(found.values())))
            cores = os.cpu_count()
            print(f"{problem:<7} {size} processes: {speed:.2f} times as fast, on {cores} cores")
            results[f"{problem} {size}"] = {"alone": alone, **found, "over": over, "speed": speed}
            if options.memory:
                show_peaks(problem, size, options)
            slower |= problem == "nexus" and size == 2 and over > MOST_OVER_HAND
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    sys.exit(slower)


if __name__ == "__main__":
    main()
