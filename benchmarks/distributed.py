"""What `ddp` costs beside PyTorch's DistributedDataParallel by hand, and what two processes bring.

    python -m benchmarks.distributed [--rounds 5] [--steps 40] [--width 512] [--json PATH]

Everybody trains the same network (four linear layers, AdamW, cross-entropy, gradients clipped) on
the same global batch of 64 rows, with one thread a process. Cases:

    alone     our engine in one process
    ours      our engine with `ddp`, the batch shared by two processes
    by hand   a loop of PyTorch's own calls around DistributedDataParallel, in two processes

The two-process cases run in the same two processes, one after the other in turns, and the order
turns around from round to round, so that whatever else the machine does meets both alike. A round
counts as the median time of a step on the wall, on rank 0; the table shows the median over the
rounds, and of the ratio taken within a round, with the least and the most. The trained weights of
the two cases are compared at the end: they must have done the same work.

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
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from nexus_core import Engine
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin

ROWS, CLASSES, MAX_NORM, WARMUP = 64, 10, 0.5, 5
MOST_OVER_HAND = 1.03
Batch = tuple[Tensor, Tensor]
Times = list[float]


class Feed:
    """This process's share of ready batches; notes when each is asked for."""

    def __init__(self, steps: int, width: int, rank: int, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        share = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
        self.ready: list[Batch] = [
            (
                torch.randn(ROWS, width, generator=generator)[share],
                torch.randint(CLASSES, (ROWS,), generator=generator)[share],
            )
            for _ in range(8)
        ]
        self.steps = steps
        self.asked: Times = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):  # type: ignore[no-untyped-def]
        for place in range(self.steps):
            self.asked.append(time.perf_counter())
            yield self.ready[place % len(self.ready)]

    def seconds(self) -> float:
        """Of a step: the median after the warm-up."""
        times = self.asked[WARMUP:]
        return statistics.median(b - a for a, b in pairwise(times))


def network(width: int) -> nn.Sequential:
    """Four layers, always with the same weights."""
    torch.manual_seed(0)
    layers = [module for _ in range(3) for module in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over this process's rows."""
    return F.cross_entropy(model(batch[0]), batch[1])


def by_engine(feed: Feed, width: int) -> nn.Module:
    """Our engine, with `ddp` where there are peers."""
    model = network(width)
    plugins = [ClipPlugin(max_norm=MAX_NORM), *([DdpPlugin()] if dist.is_initialized() else [])]
    optimizer = AdamW(model.parameters(), fused=True)
    Engine(model, optimizer, loss=loss_of, plugins=plugins).fit(feed, until=len(feed))
    return model


def by_hand(feed: Feed, width: int) -> nn.Module:
    """PyTorch's own calls."""
    model = network(width)
    parallel = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), fused=True)
    for step, batch in enumerate(feed, start=1):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(parallel, batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        if step % 10 == 0:
            loss.item()
    return model


def measure(rounds: int, steps: int, width: int) -> dict[str, Times]:
    """Seconds of a step in each round, by case, in this process and its peers."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cases: dict[str, Callable[[Feed, int], nn.Module]] = {"ours": by_engine}
    cases |= {"by hand": by_hand} if size > 1 else {}
    found: dict[str, Times] = {name: [] for name in cases}
    trained: dict[str, Tensor] = {}
    for number in range(rounds):
        for name in list(cases)[:: 1 if number % 2 else -1]:
            feed = Feed(steps, width, rank, size)
            model = cases[name](feed, width)
            trained[name] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            found[name].append(feed.seconds())
    if size > 1:
        torch.testing.assert_close(trained["ours"], trained["by hand"], rtol=1e-3, atol=1e-4)
    return found


def in_processes(size: int, rounds: int, steps: int, width: int) -> dict[str, Times]:
    """`measure` in so many processes under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "-m", "benchmarks.distributed", "--rounds", str(rounds), "--steps", str(steps),
            "--width", str(width), "--worker", str(path),
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        times: dict[str, Times] = json.loads(path.read_text())
        return times


def work(path: Path, rounds: int, steps: int, width: int) -> None:
    """In a process of the launcher: measure, and let rank 0 write."""
    torch.set_num_threads(1)
    DdpPlugin().join()
    found = measure(rounds, steps, width)
    if int(os.environ["RANK"]) == 0:
        path.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Measure, print the table, and fail where we are slower than allowed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.rounds, options.steps, options.width
    if options.worker:
        work(options.worker, *sizes)
        return
    alone, pair = in_processes(1, *sizes)["ours"], in_processes(2, *sizes)
    ratios = [a / b for a, b in zip(pair["ours"], pair["by hand"], strict=True)]
    rows = {"alone": alone, "ours": pair["ours"], "by hand": pair["by hand"]}
    for name, times in rows.items():
        print(f"{name:<10} {1e3 * statistics.median(times):8.2f} ms a step")
    over = statistics.median(ratios)
    speed = statistics.median(alone) / statistics.median(pair["ours"])
    print(f"ours / by hand: {over:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"one process / two: {speed:.2f} times as fast, on {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps({**rows, "over": over, "speed": speed}, indent=2))
    sys.exit(over > MOST_OVER_HAND)


if __name__ == "__main__":
    main()
