"""The cost of saving, resuming and guarding: how long training is blocked, how fast it resumes.

    python -m benchmarks.checkpoint [--megabytes 100] [--rounds 7] [--json PATH]

*Saving* trains a stack of matrices with AdamW and a checkpoint at every other step. Measured in
turns: how long the loop is blocked by a save that a thread then writes, syncs and hashes, and how
long a plain `torch.save` of the same model and optimizer takes, which blocks the loop throughout
and syncs nothing. The thread has finished before `torch.save` is timed.

*Resuming* loads the last of these checkpoints, with a cold and with a warm page cache: from the
call of `Engine.resume` to the start of the first step (finding, reading, verifying every hash,
restoring), compared with reading the same files with `read()`.

*Guarding* trains quickstart_classic and sums the time spent in the guard's hooks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_core import Batch, Engine, hookimpl
from nexus_core.cli.build import build_plugins, make_engine
from nexus_core.cli.settings import read_settings
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.guard import GuardPlugin

WIDTH = 1024
PERIOD = 2  # steps


class TimedCheckpointPlugin(CheckpointPlugin):
    """Measures how long its saves block the loop; waits for the thread outside that time."""

    name = "checkpoint"

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.held: list[float] = []

    @hookimpl(trylast=True)
    def on_step_end(self, engine: Engine) -> None:
        begin = time.perf_counter()
        super().on_step_end(engine)
        if engine.state.step % PERIOD == 0:
            self.held.append(time.perf_counter() - begin)

    def drain(self) -> None:
        """Wait until all writing is finished."""
        if self._writer is not None:
            self._settle(self._writer)


class TimedGuardPlugin(GuardPlugin):
    """Measures the time in its per-step hooks."""

    name = "guard"
    seconds = 0.0

    @hookimpl(trylast=True)
    def on_batch(self, engine: Engine, batch: Batch) -> None:
        begin = time.perf_counter()
        super().on_batch(engine, batch)
        self.seconds += time.perf_counter() - begin

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        begin = time.perf_counter()
        super().after_backward(engine)
        self.seconds += time.perf_counter() - begin


def stack_engine(megabytes: int, out: Path, plugin: CheckpointPlugin) -> Engine:
    """An engine with this many megabytes of float32 matrices."""
    torch.manual_seed(0)
    count = max(1, megabytes * 2**20 // (4 * WIDTH * WIDTH))
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    return Engine(model, optimizer, loss=loss, plugins=[plugin], out=out)


def measure_saving(megabytes: int, rounds: int, out: Path) -> dict[str, Any]:
    """Seconds for which the loop is blocked, by ours and by `torch.save`, round by round."""
    plugin = TimedCheckpointPlugin(every=PERIOD, keep_last=1, best=None, final=False)
    engine = stack_engine(megabytes, out, plugin)
    theirs = []
    for state in engine.steps([torch.randn(8, WIDTH)] * 4, until=PERIOD * rounds):
        plugin.drain()
        if state.step % PERIOD:
            continue
        both = {"model": engine.model.state_dict(), "optimizer": engine.optimizer.state_dict()}
        begin = time.perf_counter()
        torch.save(both, out / f"peer-{state.step % 2}.pt")
        theirs.append(time.perf_counter() - begin)
    ours = plugin.held
    return {
        "megabytes of state": round(3 * megabytes),
        "blocked, first save": ours[0],
        "blocked, median": statistics.median(ours),
        "blocked, slowest": max(ours),
        "torch.save, median": statistics.median(theirs),
        "ratio of medians": statistics.median(ours) / statistics.median(theirs),
        "ratio, first save": ours[0] / statistics.median(theirs),
    }


def measure_resuming(megabytes: int, rounds: int, out: Path) -> dict[str, Any]:
    """Seconds to read the files, and until ready for the first step."""
    (folder,) = (out / "checkpoints").glob("step-*")
    files = sorted(folder.iterdir())
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for kind, prepare in (("cold", _forget), ("warm", _remember)):
            prepare(files)
            read = _timed(lambda: [_read(path) for path in files])
            prepare(files)
            engine = stack_engine(megabytes, out, TimedCheckpointPlugin(best=None))
            prepare(files)
            resumed = _timed(engine.resume)
            seconds.setdefault(f"read, {kind}", []).append(read)
            seconds.setdefault(f"resume, {kind}", []).append(resumed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for kind in ("cold", "warm"):
        medians[f"ratio, {kind}"] = medians[f"resume, {kind}"] / medians[f"read, {kind}"]
    return medians


def measure_guard(steps: int) -> dict[str, Any]:
    """Seconds in the guard's hooks and in whole steps of quickstart_classic."""
    built = build_plugins(read_settings("quickstart_classic", "", (), {}))
    others = [p for p in built.plan.plugins if p.name not in ("checkpoint", "console", "guard")]
    guard = TimedGuardPlugin()
    with tempfile.TemporaryDirectory() as out:
        made = make_engine(built, Path(out))
        engine = Engine(made.model, made.optimizer, plugins=[*others, guard], seed=0, out=out)
        data = made.data
        assert data is not None
        running = engine.steps(data.train, until=built.run.until)
        for _ in range(3):
            next(running)
        guard.seconds, begin = 0.0, time.perf_counter()
        for _ in range(steps):
            next(running)
        whole = time.perf_counter() - begin
        running.close()
    return {
        "step, seconds": whole / steps,
        "guard, seconds": guard.seconds / steps,
        "share": guard.seconds / whole,
    }


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _read(path: Path) -> int:
    with io.FileIO(path) as file:
        return len(file.readall())


def _forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _remember(files: list[Path]) -> None:
    for path in files:
        _read(path)


def main() -> None:
    """Print the three tables; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="of parameters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--guard-steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        out = Path(folder)
        saving = measure_saving(options.megabytes, options.rounds, out)
        resuming = measure_resuming(options.megabytes, options.rounds, out)
    tables = {
        "saving": saving,
        "resuming": resuming,
        "guarding": measure_guard(options.guard_steps),
    }
    for title, table in tables.items():
        print(title)
        for name, value in table.items():
            print(f"  {name:<24}{value:>10.4g}")
    promises = {
        "saving blocks the loop for at most 20% of torch.save": saving["ratio of medians"] <= 0.2,
        "resuming takes at most 1.2 times reading": resuming["ratio, cold"] <= 1.2,
        "the guard costs at most 2% of a step": tables["guarding"]["share"] <= 0.02,
    }
    for promise, kept in promises.items():
        print(f"{'met   ' if kept else 'MISSED'}  {promise}")
    if options.json:
        options.json.write_text(json.dumps({**tables, "promises": promises}, indent=2))
    raise SystemExit(0 if all(promises.values()) else 1)


if __name__ == "__main__":
    main()
