"""What `ddp` costs beside PyTorch's DistributedDataParallel by hand, and what two processes bring.

    python -m benchmarks.distributed [--rounds 5] [--problems nexus small] [--json PATH]

Everybody trains the same network (AdamW, cross-entropy, gradients clipped) on the same global
batch, with one thread a process. Problems:

    nexus     the backbone of the quickstart on 4,096 bytes a step, whose ratio is judged
    small     four linear layers and 64 rows: a step takes milliseconds, and every message counts

and cases:

    alone     our engine in one process
    ours      our engine with `ddp`, the batch shared by two processes
    by hand   a loop of PyTorch's own calls around DistributedDataParallel, in two processes

The two-process cases run in the same two processes and take turns step by step, and the order turns
around from step to step, so that whatever else the machine does meets both alike. A round counts as
the median time of a step on the wall, on rank 0; the table shows the median over the rounds, and of
the ratio taken within a round the median, the least and the most. The trained weights of the two
cases are compared at the end: they must have done the same work.

On a machine whose cores the case `alone` already fills, two processes cannot be twice as fast.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.model_nexus import NEXUSCore

MAX_NORM, WARMUP = 0.5, 3
MOST_OVER_HAND = 1.03
Batch = tuple[Tensor, Tensor]
Times = list[float]


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Args:
        model: builds it, always with the same weights.
        batch: draws a global batch.
        steps: of a round.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    steps: int


def backbone() -> nn.Module:
    """The state-space layers of the quickstart, over bytes."""
    modules = dict.fromkeys(("world", "reason", "energy", "causal"), False)
    return NEXUSCore(vocab_size=256, d_model=128, ssm_n_layers=4, **modules)


def bytes_to_predict(generator: torch.Generator) -> Batch:
    """8 rows of 512, and what follows each byte."""
    rows = torch.randint(256, (8, 513), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def linear_layers(width: int = 512, classes: int = 10) -> nn.Module:
    """Four of them."""
    layers = [module for _ in range(3) for module in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def points_to_sort(generator: torch.Generator, rows: int = 64) -> Batch:
    """Rows of 512 numbers, and a class for each."""
    points = torch.randn(rows, 512, generator=generator)
    return points, torch.randint(10, (rows,), generator=generator)


PROBLEMS = {
    "nexus": Problem(backbone, bytes_to_predict, steps=15),
    "small": Problem(linear_layers, points_to_sort, steps=60),
}


class Feed:
    """This process's share of ready batches."""

    def __init__(self, problem: Problem, rank: int, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        batches = [problem.batch(generator) for _ in range(8)]
        rows = len(batches[0][0])
        share = slice(rank * rows // size, (rank + 1) * rows // size)
        self.ready: list[Batch] = [(inputs[share], labels[share]) for inputs, labels in batches]
        self.steps = problem.steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return (self.ready[place % len(self.ready)] for place in range(self.steps))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over this process's rows."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def by_engine(model: nn.Module, feed: Feed) -> Iterator[object]:
    """Our engine, with `ddp` where there are peers; goes on after each step."""
    plugins: list[Plugin[Any]] = [ClipPlugin(max_norm=MAX_NORM)]
    plugins += [DdpPlugin()] if dist.is_initialized() else []
    optimizer = AdamW(model.parameters(), fused=True)
    yield from Engine(model, optimizer, loss=loss_of, plugins=plugins).steps(feed, until=len(feed))


def by_hand(model: nn.Module, feed: Feed) -> Iterator[object]:
    """PyTorch's own calls; goes on after each step."""
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


def measure(problem: Problem, rounds: int) -> dict[str, Times]:
    """Seconds of a step in each round, by case, in this process and its peers."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cases = {"ours": by_engine, **({"by hand": by_hand} if size > 1 else {})}
    found: dict[str, Times] = {name: [] for name in cases}
    for _ in range(rounds):
        models = {}
        for name in cases:
            torch.manual_seed(0)
            models[name] = problem.model()
        feed = Feed(problem, rank, size)
        runs = {name: cases[name](models[name], feed) for name in cases}
        times: dict[str, Times] = {name: [] for name in cases}
        for step in range(problem.steps):
            for name in list(runs)[:: 1 if step % 2 else -1]:
                begin = time.perf_counter()
                next(runs[name])
                times[name].append(time.perf_counter() - begin)
        for name, run in runs.items():
            list(run)  # to its end, where it gives back what it took
            found[name].append(statistics.median(times[name][WARMUP:]))
        if size > 1:
            one, other = ([*models[name].parameters()] for name in cases)
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    return found


def in_processes(size: int, problem: str, rounds: int) -> dict[str, Times]:
    """`measure` in so many processes under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "-m", "benchmarks.distributed", "--rounds", str(rounds), "--problems", problem,
            "--worker", str(path),
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        times: dict[str, Times] = json.loads(path.read_text())
        return times


def work(path: Path, problem: Problem, rounds: int) -> None:
    """In a process of the launcher: measure, and let rank 0 write."""
    torch.set_num_threads(1)
    DdpPlugin().join()
    found = measure(problem, rounds)
    if int(os.environ["RANK"]) == 0:
        path.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Measure, print a table for each problem, and fail where we are slower than allowed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, PROBLEMS[options.problems[0]], options.rounds)
        return
    results: dict[str, dict[str, Times | float]] = {}
    slower = False
    for problem in options.problems:
        alone = in_processes(1, problem, options.rounds)["ours"]
        rows = {"alone": alone, **in_processes(2, problem, options.rounds)}
        ratios = [a / b for a, b in zip(rows["ours"], rows["by hand"], strict=True)]
        over, speed = (
            statistics.median(ratios),
            statistics.median(alone) / statistics.median(rows["ours"]),
        )
        for name, times in rows.items():
            print(f"{problem:<7} {name:<9} {1e3 * statistics.median(times):8.2f} ms a step")
        print(f"{problem:<7} ours / by hand: {over:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"{problem:<7} two processes: {speed:.2f} times as fast, on {os.cpu_count()} cores")
        results[problem] = {**rows, "over": over, "speed": speed}
        slower |= problem == "nexus" and over > MOST_OVER_HAND
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    sys.exit(slower)


if __name__ == "__main__":
    main()
