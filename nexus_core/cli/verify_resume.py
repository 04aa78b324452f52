"""`nexus-run verify-resume`: verify that a run killed at random moments ends bitwise identical.

The run is done once undisturbed, then again, killed by SIGKILL as often as requested (a third of
the times during a save) and resumed each time. A plugin records, step by step, digests of batches,
generators, losses, gradients, weights, optimizer and each plugin's state; the notes and metrics of
both runs must agree to the last line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from nexus_core.cli.errors import reported
from nexus_core.cli.folder import automatic
from nexus_core.cli.notes import (
    NOTES,
    companions,
    fingerprint,
    last_step,
    notes_of,
    starts_of,
    whole_lines,
    witness,
)
from nexus_core.cli.nursery import nursery, stand_alone
from nexus_core.cli.options import PATH
from nexus_core.errors import ConfigError, RunError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

__all__ = ["Order", "Report", "compare_runs", "last_step", "main", "verify_resume"]

CERTIFICATE = "certificate.json"
_CLOCKS = ("time", "seconds")  # differ between any two runs
_CLOCK_PREFIXES = ("system/",)
_SAVE_SHARE = 1 / 3
_PATIENCE_S = 600.0


@dataclass
class Report:
    """The result of a verification.

    Args:
        kills: number of times the run was killed and resumed.
        terms: how many of the kills were SIGTERM, after which a run saves and ends.
        within_saves: how many of the kills hit a checkpoint being written.
        steps: number of steps of the run.
        differences: what differs, in order of steps; empty if the runs agree.
        fingerprint: hash of the last line of notes, which covers the whole state.
    """

    kills: int = 0
    terms: int = 0
    within_saves: int = 0
    steps: int = 0
    differences: list[str] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def holds(self) -> bool:
        """Whether the killed run ended bitwise identical."""
        return not self.differences


def verify_resume(
    config: str | None,
    out: Path,
    *,
    kills: int = 5,
    plugins: str = "",
    sets: Sequence[str] = (),
    seed: int = 0,
    threads: int | None = None,
    terms: float = 0.0,
    bare: bool = False,
) -> Report:
    """Run twice, undisturbed and killed, and compare every step.

    Args:
        config: a config file or preset, as `nexus-run` takes it.
        out: a folder for both runs and the certificate; must not exist yet.
        kills: how often to kill.
        plugins: as in `--plugins`.
        sets: as in each `--set`.
        seed: seed for the moments of the kills.
        threads: torch threads of a run; None leaves it to torch.
        terms: share of the kills that send SIGTERM, not SIGKILL, to the run and its workers.
        bare: do not add the plugins that packages provide for this.

    Returns:
        The report, which is also written to `certificate.json`.

    Raises:
        ConfigError: the folder exists.
        RunError: a run failed on its own.
    """
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        said = f"'{out}' already exists; verify-resume needs a new folder: --out DIR"
        raise ConfigError(said) from error
    except OSError as error:
        raise ConfigError(f"cannot create the folder '{out}': {error.strerror}") from error
    named = ",".join([*([] if bare else companions()), *filter(None, [plugins])])
    order = Order(config, named, tuple(sets), threads)
    processes = nursery("nexus_core.cli.verify_resume")
    undisturbed, disturbed = out / "undisturbed", out / "killed"
    _finish(_live(processes, order, undisturbed), undisturbed)
    report = Report(steps=len(notes_of(undisturbed)))
    moments = random.Random(seed)
    while report.kills < kills:
        life = _live(processes, order, disturbed)
        term = moments.random() < terms
        shows = report.kills < kills - 1 or _went_on(disturbed)
        steps = report.steps / (kills + 1)  # one share for each session, and one for the end
        if not _kill(life, disturbed, steps, moments, term=term, saved=not shows):
            _finish(life, disturbed)
            break
        report.kills += 1
        report.terms += term
        report.within_saves += _saving(disturbed)
    else:
        _finish(_live(processes, order, disturbed), disturbed)
    report.differences = compare_runs(undisturbed, disturbed)
    if not _went_on(disturbed):
        report.differences.append(
            "nothing was verified: the killed run never resumed from a checkpoint; add a "
            "plugin that saves, save more often, or train longer"
        )
    report.fingerprint = fingerprint(undisturbed)
    _certify(order, report, out / CERTIFICATE)
    return report


@dataclass(frozen=True)
class Order:
    """What to run."""

    config: str | None
    plugins: str
    sets: tuple[str, ...]
    threads: int | None


def _live(processes: ForkServerContext, order: Order, out: Path) -> ForkServerProcess:
    life = processes.Process(target=_life, args=(order, out))
    life.start()
    return life


def _life(order: Order, out: Path) -> None:
    """In its own process: the run, resumed if there is something to resume."""
    from nexus_core.cli.build import build_plugins, make_engine
    from nexus_core.cli.folder import RunFolder
    from nexus_core.cli.session import train
    from nexus_core.cli.settings import read_settings
    from nexus_core.plan import arrange

    stand_alone(out.with_suffix(".log"))
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    with reported(debug=True):
        values = {"out": out}
        settings = read_settings(order.config, order.plugins, order.sets, os.environ, values)
        made = build_plugins(settings)
        plan = arrange([*made.plan.plugins, witness()])
        made = dataclasses.replace(made, plan=plan)
        engine = make_engine(made, out)
        sys.exit(train(engine, made.run, "auto", RunFolder(out), quiet=True))


def _finish(life: ForkServerProcess, out: Path) -> None:
    life.join()
    if life.exitcode != 0:
        log = out.with_suffix(".log")
        said = log.read_text(errors="replace")
        if life.exitcode == ConfigError.exit_code and "error: " in said:  # a user's mistake
            raise ConfigError(said.rpartition("\nerror: ")[2].strip())
        raise RunError(
            f"the run ended with exit code {life.exitcode}; last lines of {log}: "
            f"{said[-600:].strip()}"
        )


def _kill(
    life: ForkServerProcess,
    out: Path,
    steps: float,
    moments: random.Random,
    *,
    term: bool,
    saved: bool,
) -> bool:
    """Kill a run at a random moment; False if it ended before that.

    Args:
        life: the run.
        out: its folder.
        steps: the most steps this session may take beyond the notes of the last one, whatever was
            drawn: a run that ends by itself shows nothing.
        moments: decides when; one kill in three waits for a checkpoint that is being written, and
            one in ten does not wait for a step.
        term: kill with SIGTERM to the run and its workers.
        saved: kill as soon as there is a checkpoint to resume from.
    """
    within_save = not saved and moments.random() < _SAVE_SHARE
    at_start = not (within_save or saved) and moments.random() < 0.1
    begin = last_step(out / NOTES)
    target = begin + moments.uniform(0, steps)
    limit = time.monotonic() + (moments.uniform(0, 3) if at_start else _PATIENCE_S)
    while life.is_alive() and time.monotonic() < limit:
        reached = last_step(out / NOTES)
        if reached >= begin + steps and not saved:
            break
        if saved:
            if any(out.glob("checkpoints*/step-*[1-9]*")):
                break
        elif not at_start and reached >= target:
            if not within_save:
                time.sleep(moments.uniform(0, 0.02))
                break
            if _saving(out) and _caught_saving(life, out, moments.uniform(0, 0.005)):
                break
        time.sleep(0.001)
    if not life.is_alive():
        return False
    assert life.pid is not None
    with suppress(ProcessLookupError):
        if term:
            os.kill(life.pid, signal.SIGCONT)  # it may have been frozen during a save
            try:
                os.killpg(life.pid, signal.SIGTERM)
            except ProcessLookupError:  # it has no process group yet, so no workers
                os.kill(life.pid, signal.SIGTERM)
            life.join()
            return life.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        os.kill(life.pid, signal.SIGKILL)
    life.join()
    return life.exitcode == -signal.SIGKILL


def _went_on(out: Path) -> bool:
    """Whether a session of the killed run has started from a checkpoint."""
    return any(starts_of(out))


def _saving(out: Path) -> bool:
    return any(out.glob("checkpoints*/.tmp-*"))


def _caught_saving(life: ForkServerProcess, out: Path, delay: float) -> bool:
    """Freeze the run a moment later; let it continue if its save had finished by then."""
    assert life.pid is not None
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(life.pid, signal.SIGSTOP)
        if _saving(out):
            return True
        os.kill(life.pid, signal.SIGCONT)
    return False


def compare_runs(undisturbed: Path, killed: Path) -> list[str]:
    """Where two runs first differ, and in what, in their notes and metrics.

    Args:
        undisturbed: folder of a run with a witness.
        killed: folder of the other run.
    """
    ours, theirs = notes_of(undisturbed), notes_of(killed)
    differences = []
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        differences.append(f"the steps: {len(ours)} undisturbed, {len(theirs)} killed")
    for mine, other in zip(ours, theirs, strict=False):
        if odd := _odd_keys(mine, other):
            differences.append(f"step {mine['step']}: {odd}")
            break
    lines, others = _metrics(undisturbed), _metrics(killed)
    if len(lines) != len(others):
        differences.append(f"metrics.jsonl: {len(lines)} lines undisturbed, {len(others)} killed")
    for number, (line, other) in enumerate(zip(lines, others, strict=False), start=1):
        if odd := _odd_keys(line, other):
            differences.append(f"metrics.jsonl, line {number}: {odd}")
            break
    return differences


def _odd_keys(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The keys whose values differ, including nested ones."""
    odd = []
    for key in {**mine, **other}:
        one, two = mine.get(key), other.get(key)
        if one != two:
            nested = isinstance(one, dict) and isinstance(two, dict)
            odd.append(f"{key} ({_odd_keys(one or {}, two or {})})" if nested else key)
    return ", ".join(odd)


def _metrics(out: Path) -> list[dict[str, Any]]:
    """The logged metrics, except timings."""
    return [
        {
            key: value
            for key, value in line.items()
            if key not in _CLOCKS and not key.startswith(_CLOCK_PREFIXES)
        }
        for line in map(json.loads, whole_lines(out / "metrics.jsonl"))
        if "note" not in line  # notes may contain timings
    ]


def _certify(order: Order, report: Report, path: Path) -> None:
    certificate = {
        "holds": report.holds,
        **dataclasses.asdict(report),
        "order": dataclasses.asdict(order),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "machine": platform.platform(),
    }
    path.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")


@click.command(name="verify-resume", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", required=False, metavar="[CONFIG|PRESET]")
@click.option("-p", "--plugins", default="",
              help="Add plugins by name or file, or remove some: a,./my.py,no:c.")  # fmt: skip
@click.option("-s", "--set", "sets", multiple=True, metavar="KEY=VALUE", help="As in nexus-run.")
@click.option(
    "--kills",
    default=5,
    show_default=True,
    type=click.IntRange(min=1),
    help="How often to kill the run.",
)
@click.option("--seed", default=0, show_default=True, help="Seed for the moments of the kills.")
@click.option("--out", type=PATH, help="New folder for both runs.")
@click.option("--bare", is_flag=True, help="Do not add plugins that make runs exact.")
@click.option("--keep", is_flag=True, help="Keep both runs, not only the certificate.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(
    config: str | None,
    plugins: str,
    sets: tuple[str, ...],
    kills: int,
    seed: int,
    out: Path | None,
    bare: bool,
    keep: bool,
    debug: bool,
) -> None:
    """Kill a run at random moments, resume it, and verify that it ends bitwise identical."""
    with reported(debug):
        out = out or next(path for path in automatic("verify-resume") if not path.exists())
        report = verify_resume(
            config, out, kills=kills, plugins=plugins, sets=sets, seed=seed, bare=bare
        )
        if report.holds and not keep:
            for folder in ("undisturbed", "killed"):
                shutil.rmtree(out / folder)
        click.echo(
            f"{report.kills} kills, {report.within_saves} of them during a save, over "
            f"{report.steps} steps: {'the same bits' if report.holds else 'NOT the same'}"
        )
        for difference in report.differences:
            click.echo(f"  {difference}")
        click.echo(f"certificate: {out / CERTIFICATE}")
        sys.exit(0 if report.holds else 1)


if __name__ == "__main__":
    main()
