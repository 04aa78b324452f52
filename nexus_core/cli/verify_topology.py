"""`nexus-run verify-topology`: verify that a run is bitwise identical on any number of processes.

The run is done once on each number of processes, then once more, killed by SIGKILL at random
moments and resumed on a different number each time. A plugin records, step by step, digests of
batches, generators, losses, gradients, weights, optimizer and each plugin's state; the notes and
metrics of all runs must agree to the last line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from nexus_core.cli import distributed
from nexus_core.cli.blame import blame
from nexus_core.cli.errors import reported
from nexus_core.cli.folder import automatic
from nexus_core.cli.notes import NOTES, fingerprint, last_step, notes_of, witness
from nexus_core.cli.nursery import free_port, nursery, stand_alone
from nexus_core.cli.options import PATH
from nexus_core.cli.verify_resume import Order, compare_runs
from nexus_core.errors import ConfigError, RunError
from nexus_core.plan import AnyPlugin

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

__all__ = ["Report", "main", "verify_topology"]

CERTIFICATE = "certificate.json"
_PATIENCE_S = 600.0


@dataclass
class Report:
    """The result of a verification.

    Args:
        sizes: the numbers of processes tested.
        lives: sessions of the resized run: number of processes, and step at which it was killed.
        steps: number of steps of the run.
        differences: what differs from the first run, by run; empty if all agree.
        blame: where the first differing run diverges within a step, and the plugins involved.
        unpromised: plugins of the run that do not promise what was verified.
        fingerprint: hash of the last line of notes, which covers the whole state.
    """

    sizes: tuple[int, ...]
    lives: list[tuple[int, int]] = field(default_factory=list)
    steps: int = 0
    differences: list[str] = field(default_factory=list)
    blame: str = ""
    unpromised: list[str] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def holds(self) -> bool:
        """Whether all runs are bitwise identical."""
        return not self.differences


def verify_topology(
    order: Order, out: Path, *, sizes: Sequence[int], resize: int = 0, seed: int = 0
) -> Report:
    """Run on each number of processes, and compare every step.

    Args:
        order: what to run.
        out: a folder for the runs and the certificate; must not exist yet.
        sizes: numbers of processes.
        resize: how often another run is killed and resumed on a different number.
        seed: seed for the moments of the kills and the numbers of processes.

    Returns:
        The report, which is also written to `certificate.json`.

    Raises:
        ConfigError: the folder exists, the run is not in cells, or has no distributed plugin.
        RunError: a run failed on its own.
    """
    plugins = _check(order)
    loose = [plugin.name for plugin in plugins if not plugin.topology_invariant]
    report = Report(tuple(sizes), unpromised=loose)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot create the folder '{out}': {error.strerror}") from error
    processes = nursery("nexus_core.cli.verify_topology")
    first = out / f"on-{sizes[0]}"
    for size in sizes:
        _finish(_live(processes, order, out / f"on-{size}", size), out / f"on-{size}")
    report.steps = len(notes_of(first))
    others = [out / f"on-{size}" for size in sizes[1:]]
    if resize:
        others.append(out / "resized")
        _resize(processes, order, out / "resized", report, resize, random.Random(seed))
    for other in others:
        found = compare_runs(first, other)
        report.differences += [f"{other.name} beside {first.name}: {what}" for what in found]
        report.blame = report.blame or blame(first, other, plugins)
    report.fingerprint = fingerprint(first)
    _certify(order, report, out / CERTIFICATE)
    return report


def _check(order: Order) -> list[AnyPlugin]:
    """The plugins of the run.

    Raises:
        ConfigError: the run cannot use several processes, or promises nothing itself.
    """
    from nexus_core.cli.build import build_plugins
    from nexus_core.cli.settings import read_settings

    settings = read_settings(order.config, order.plugins, order.sets, os.environ, {})
    plan = build_plugins(settings).plan
    if settings.run.cells is None:
        raise ConfigError(
            "results depend on the number of processes unless the run is in cells; set cells "
            "to the largest number of processes it should ever run on: --set cells=8"
        )
    if not any(plugin.slot == distributed.SLOT for plugin in plan.plugins):
        raise ConfigError(
            f"no plugin of this run trains on several processes; add one that fills the slot "
            f"'{distributed.SLOT}' (nexus-plugins list)"
        )
    return list(plan.plugins)


def _live(
    processes: ForkServerContext, order: Order, out: Path, size: int
) -> list[ForkServerProcess]:
    port = free_port()
    lives = [
        processes.Process(target=_life, args=(order, out, rank, size, port)) for rank in range(size)
    ]
    for life in lives:
        life.start()
    return lives


def _life(order: Order, out: Path, rank: int, size: int, port: int) -> None:
    """In its own process: one rank of the run, resumed if there is something to resume."""
    from nexus_core.cli.build import build_plugins, make_engine
    from nexus_core.cli.folder import run_folder
    from nexus_core.cli.session import train
    from nexus_core.cli.settings import read_settings
    from nexus_core.plan import arrange

    stand_alone(out.with_suffix(".log"))
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(order.threads or 1)
    with reported(debug=True):
        values = {"out": out}
        settings = read_settings(order.config, order.plugins, order.sets, os.environ, values)
        made = build_plugins(settings)
        plan = arrange([*made.plan.plugins, witness()])
        made = dataclasses.replace(made, plan=plan)
        with run_folder(made, "auto") as folder:
            code = train(make_engine(made, out), made.run, "auto", folder, quiet=True)
        del made, plan
        distributed.leave()
        sys.exit(code)


def _finish(lives: Sequence[ForkServerProcess], out: Path) -> None:
    """Wait for all processes of a run.

    Raises:
        RunError: one failed.
    """
    for life in lives:
        life.join()
    if bad := [life.exitcode for life in lives if life.exitcode]:
        log = out.with_suffix(".log")
        raise RunError(
            f"the run '{out.name}' ended with exit code {bad[0]}; last lines of {log}: "
            f"{log.read_text(errors='replace')[-900:].strip()}"
        )


def _resize(
    processes: ForkServerContext,
    order: Order,
    out: Path,
    report: Report,
    times: int,
    moments: random.Random,
) -> None:
    """Run once more, killed several times and resumed on a different number of processes."""
    size = moments.choice(report.sizes)
    for place in range(times):
        lives = _live(processes, order, out, size)
        begin = last_step(out / NOTES)
        left = (report.steps - begin) / (times + 1 - place)
        target = begin + max(1.0, moments.uniform(0.2, 1.0) * left)
        limit = time.monotonic() + _PATIENCE_S
        while all(life.is_alive() for life in lives) and time.monotonic() < limit:
            if last_step(out / NOTES) >= target:
                break
            time.sleep(0.005)
        for life in lives:
            life.kill()
        for life in lives:
            life.join()
        report.lives.append((size, last_step(out / NOTES)))
        size = moments.choice([other for other in report.sizes if other != size] or [size])
    report.lives.append((size, report.steps))
    _finish(_live(processes, order, out, size), out)


def _certify(order: Order, report: Report, path: Path) -> None:
    certificate = {
        "holds": report.holds,
        **dataclasses.asdict(report),
        "order": dataclasses.asdict(order),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": order.threads or 1,
        "machine": platform.platform(),
        "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "libraries": torch.__config__.show().split("\n"),
    }
    path.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    """The name of the processor, if known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


@click.command(name="verify-topology", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", required=False, metavar="[CONFIG|PRESET]")
@click.option("-p", "--plugins", default="",
              help="Add plugins by name or file, or remove some: a,./my.py,no:c.")  # fmt: skip
@click.option("-s", "--set", "sets", multiple=True, metavar="KEY=VALUE", help="As in nexus-run.")
@click.option("--sizes", default="1,2,3,4", show_default=True, help="Numbers of processes.")
@click.option("--resize", default=3, show_default=True, type=click.IntRange(min=0),
              help="How often to kill it and resume on a different number.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed for the moments of the kills.")
@click.option("--out", type=PATH, help="New folder for the runs.")
@click.option("--keep", is_flag=True, help="Keep the runs, not only the certificate.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(
    config: str | None,
    plugins: str,
    sets: tuple[str, ...],
    sizes: str,
    resize: int,
    seed: int,
    out: Path | None,
    keep: bool,
    debug: bool,
) -> None:
    """Run on several numbers of processes, kill and resume, and verify identical bits."""
    with reported(debug):
        if not (numbers := _numbers(sizes)):
            raise ConfigError(f"--sizes {sizes}: expected numbers of processes, such as 1,2,4")
        out = out or next(path for path in automatic("verify-topology") if not path.exists())
        order = Order(config, plugins, sets, None)
        report = verify_topology(order, out, sizes=numbers, resize=resize, seed=seed)
        if report.holds and not keep:
            for folder in [p for p in out.iterdir() if p.is_dir()]:
                shutil.rmtree(folder)
        lives = ", ".join(f"{size} until step {step}" for size, step in report.lives)
        click.echo(
            f"{report.steps} steps on {', '.join(map(str, numbers))} processes"
            f"{f', and on {lives}' if lives else ''}: "
            f"{'the same bits' if report.holds else 'NOT the same'}"
        )
        for difference in report.differences:
            click.echo(f"  {difference}")
        if report.blame:
            click.echo(f"  {report.blame}")
        if report.unpromised:
            click.echo(f"  not promised by: {', '.join(report.unpromised)}")
        click.echo(f"certificate: {out / CERTIFICATE}")
        sys.exit(0 if report.holds else 1)


def _numbers(sizes: str) -> list[int]:
    parts = sizes.split(",")
    return [int(part) for part in parts] if all(p.isdigit() and int(p) for p in parts) else []


if __name__ == "__main__":
    main()
