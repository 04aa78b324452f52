"""The cost of the plugin tape per step of quickstart_classic, with default settings.

    python -m benchmarks.tape [--steps 12]

Compares the CPU time of its hooks with that of the whole steps of the same run. This includes
reading and writing the lines, which on a CPU happens in every step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from nexus_core.cli.build import build_plugins, make_engine
from nexus_core.cli.settings import read_settings

MOST = 0.02
HOOKS = ("on_batch", "after_backward", "on_step", "on_log")


@click.command()
@click.option("--steps", default=12, help="Steps to measure, after two for warm-up.")
def main(steps: int) -> None:
    """Print the tape's share of a step."""
    share, seconds = measured(steps)
    click.echo(f"the tape takes {share:.2%} of a step of {seconds:.3f} s; at most {MOST:.0%}")
    sys.exit(0 if share <= MOST else 1)


def measured(steps: int) -> tuple[float, float]:
    """The median share of the tape in a step, and the median step in seconds."""
    settings = read_settings(
        "quickstart_classic", "tape", ("console.quiet=true", f"until={steps + 3}")
    )
    spent: list[float] = []
    whole: list[float] = []
    with TemporaryDirectory() as room:
        made = build_plugins(settings)
        plugin = next(p for p in made.plan.plugins if p.name == "tape")
        for hook in HOOKS:
            setattr(plugin, hook, _timed(getattr(plugin, hook), spent))
        engine = make_engine(made, Path(room) / "run")
        begun = time.process_time()
        for state in engine.steps(until=made.run.until):
            now = time.process_time()
            whole.append(now - begun)
            spent.append(-1.0)  # ends the step
            begun = time.process_time()
            if state.step == steps + 2:
                break
    ours, total = [], 0.0
    for value in spent:
        if value < 0:
            ours.append(total)
            total = 0.0
        else:
            total += value
    shares = sorted(a / b for a, b in zip(ours[2:], whole[2:], strict=True))
    return shares[len(shares) // 2], sorted(whole[2:])[len(whole[2:]) // 2]


def _timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: object) -> Any:
        begun = time.process_time()
        try:
            return method(*arguments)
        finally:
            spent.append(time.process_time() - begun)

    return call


if __name__ == "__main__":
    main()
