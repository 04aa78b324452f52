"""What each module adds to the language model: the backbone without and with each module.

    python -m benchmarks.ablation [--steps 200] [--seeds 3] [--json PATH]

Text and model are those of the preset quickstart_classic (the standard library's source as bytes,
width 128, 4 layers), with 2,048 tokens per step and a constant learning rate after the warm-up, so
a run can be evaluated at any step. The variants of a seed share backbone weights and data order,
and their steps are interleaved. Each seed runs in its own single-threaded process. Times are CPU
times, so other load on the machine hardly matters.

Equal steps: validation bits per byte after the given number of steps. Equal time: faster variants
continue until they have used as much time as the slowest; the second number is measured then.
Differences to the backbone are taken within a seed; the spread is the standard deviation over
seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nexus_core import Engine
from nexus_core.plan import load

MODULES = ("world", "reason", "energy", "causal")
VARIANTS: dict[str, tuple[str, ...]] = {
    "backbone": (),
    **{f"+ {name}": (name,) for name in MODULES},
    "all four": MODULES,
}
METRIC = "val/bits_per_byte"


@dataclass
class Run:
    """One variant under one seed."""

    variant: str
    seed: int
    steps: int = 0
    seconds: float = 0.0
    after_equal_steps: float = 0.0
    steps_in_equal_time: int = 0
    after_equal_time: float = 0.0


class Contender:
    """A variant in training, one step at a time."""

    def __init__(self, variant: str, seed: int) -> None:
        self.run = Run(variant, seed)
        modules = VARIANTS[variant]
        settings: dict[str, dict[str, Any]] = {
            "data_text": {"seq_len": 512, "batch_size": 4, "valid_limit": 65_536},
            "model_nexus": {
                "d_model": 128,
                "ssm_n_layers": 4,
                **{name: name in modules for name in MODULES},
            },
            "loss_lm": {"label_smoothing": 0.0},
            **{f"loss_{name}": {} for name in modules},
            "optim_adamw": {"lr": 3e-3, "weight_decay": 0.1},
            "lr_constant": {"warmup": "20 steps"},
            "clip": {},
        }
        plugins = [load(name)(**values) for name, values in settings.items()]
        self.engine = Engine(plugins=plugins, seed=seed)
        self._steps: Iterator[Any] = self.engine.steps(until="1M steps")

    def step(self) -> None:
        """Train one step, and count its time."""
        begin = time.process_time()
        next(self._steps)
        self.run.seconds += time.process_time() - begin
        self.run.steps += 1

    def measure(self) -> float:
        """The current validation bits per byte."""
        data = self.engine.data
        assert data is not None
        return self.engine.evaluate(data.valid)[METRIC]


def compete(seed: int, steps: int) -> list[Run]:
    """Train all variants with one seed."""
    torch.set_num_threads(1)
    contenders = [Contender(variant, seed) for variant in VARIANTS]
    for number in range(steps):
        # Each round starts with another one, so that none always follows the same.
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            contender.step()
    for contender in contenders:
        contender.run.after_equal_steps = contender.measure()
    budget = max(contender.run.seconds for contender in contenders)
    for contender in contenders:
        run = contender.run
        pace = run.seconds / run.steps
        extra = round((budget - run.seconds) / pace)
        for _ in range(extra):
            contender.step()
        run.steps_in_equal_time = run.steps
        run.after_equal_time = contender.measure() if extra else run.after_equal_steps
        run.steps, run.seconds = steps, pace * steps
    return [contender.run for contender in contenders]


def table(runs: list[Run]) -> str:
    """The result as a Markdown table."""
    base = {run.seed: run for run in runs if run.variant == "backbone"}
    lines = [
        "| variant | time per step | equal steps: bits/byte | vs. backbone "
        "| equal time: bits/byte | vs. backbone |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        mine = [run for run in runs if run.variant == variant]
        pace = statistics.mean(run.seconds / base[run.seed].seconds for run in mine)
        cells = [variant, f"{pace - 1:+.1%}"]
        for measure in ("after_equal_steps", "after_equal_time"):
            values = [getattr(run, measure) for run in mine]
            changes = [getattr(run, measure) - getattr(base[run.seed], measure) for run in mine]
            cells += [_mean_and_spread(values, ""), _mean_and_spread(changes, "+")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_spread(values: list[float], sign: str) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} ± {spread:.4f}"


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, and on request write every run as JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.ablation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps per run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds run in parallel")
    parser.add_argument("--json", type=Path, help="also write the runs to this file")
    options = parser.parse_args(arguments)
    of_seed = partial(compete, steps=options.steps)
    runs: list[Run] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for done in pool.imap_unordered(of_seed, range(options.seeds)):
            runs += done
            print(f"seed {done[0].seed} done", flush=True)
            if options.json:  # each time, so that an interrupted benchmark keeps its results
                text = json.dumps([asdict(run) for run in runs], indent=2)
                options.json.write_text(text + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
