"""One training session: run folder, signals, summary."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click

from nexus_core.cli import distributed
from nexus_core.cli.config import RunConfig
from nexus_core.cli.copies import code_of
from nexus_core.cli.folder import RunFolder, write_config
from nexus_core.cli.lineage import Relation, note_branch
from nexus_core.cli.records import Run
from nexus_core.cli.tables import folded
from nexus_core.engine import Engine, Result
from nexus_core.errors import NexusError

__all__ = ["has_checkpoints", "stopping_on_signals", "train", "try_resume"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 2.0
"""Seconds after a signal in which another counts as the same one: a scheduler or terminal signals
all processes, and the launcher forwards it too. A second Ctrl-C is always a second one."""


def train(
    engine: Engine, run: RunConfig, resume: str | None, folder: RunFolder, *, quiet: bool
) -> int:
    """Train in the run folder, and write config, summary and plugin output there.

    Returns:
        The exit code: 0, or 128 + the signal that ended it.

    Raises:
        NexusError: the run failed; if it did nothing yet, its files are removed.
    """
    out = folder.path
    resume = distributed.resume_source(resume)
    if resume is not None and (resume != "auto" or has_checkpoints(out)):
        engine.resume(resume)
        _say(engine, quiet, f"resumed at step {engine.state.step:,}")
    start = engine.state.step
    over = run.until.reached(engine.state) and _has_finished(out, start)
    _say(engine, quiet, _finished(engine, run) if over else _headline(engine, run))
    try:
        with stopping_on_signals(engine):
            result = _fit(engine, run, folder, resume)
    except Exception as error:
        mistake = isinstance(error, NexusError) and error.exit_code == 2
        if engine.ranks.is_main and mistake and engine.state.step == start:
            folder.remove()
        elif engine.ranks.is_main:
            with suppress(OSError):  # the error that ended the run matters more
                _write_summary(out, engine.result(), "failed", f"{type(error).__name__}: {error}")
        raise
    if engine.ranks.is_main:
        _write_summary(out, result, result.status, result.reason)
        if quiet or not over or result.status != "finished":
            click.echo(_report(engine, result, out, quiet))
    return _exit_code(result)


def _fit(engine: Engine, run: RunConfig, folder: RunFolder, resume: str | None) -> Result:
    """Train; when resuming, replace the config only once loading has succeeded."""
    settings, code = engine.config, code_of(engine)
    written = distributed.of_main(
        engine.ranks, lambda: folder.claim(settings, code, resuming=resume is not None)
    )
    begun = False
    for _ in engine.steps(until=run.until, eval_every=run.eval_every):
        if begun or not engine.ranks.is_main:
            continue
        begun = True
        if not written:
            write_config(settings, code, folder.path)
        if folder.parent is not None:
            _tell(folder.parent, folder.path)
    return engine.result()


def _tell(parent: Relation, out: Path) -> None:
    """Record the branch in the run it branches off."""
    try:
        note_branch(out, parent)
    except OSError as error:
        warnings.warn(
            f"could not record the branch in '{parent.run}': {error.strerror}",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def stopping_on_signals(engine: Engine) -> Iterator[list[int]]:
    """Stop after the current step on SIGINT or SIGTERM; a second signal ends the process at once.

    Yields:
        The signals received. The previous handlers are restored afterwards.
    """
    received: list[int] = []
    first = 0.0
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        pressed_twice = received[:1] == [signal.SIGINT] == [number] and not launched
        if received and (pressed_twice or time.monotonic() - first > ECHO_S):
            _say_at_once(engine, _kept(engine))
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        engine.stop(signal.Signals(received[0]).name, at_once=True)
        if number == signal.SIGINT and len(received) == 1:
            _say_at_once(engine, "stopping after this step; Ctrl-C again ends the run at once")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_at_once(engine: Engine, text: str) -> None:
    """Print a line to stderr, even if a print was interrupted."""
    if engine.ranks.is_main:
        with suppress(OSError):
            lines = folded(text, stream=sys.stderr)
            os.write(2, f"\n{lines}\n".encode(errors="backslashreplace"))


def _kept(engine: Engine) -> str:
    """What remains of a run that ends now."""
    ended = f"ended immediately at step {engine.state.step:,}"
    if engine.out is None:
        return ended
    found = engine.out.glob("checkpoints*/step-*")
    saved = [path for path in found if path.name[5:].isdigit()]
    if not saved:
        return f"{ended}; no checkpoint had been saved in {engine.out}"
    newest = max(saved, key=lambda path: path.name)
    return f"{ended}; kept: {newest}; to resume: nexus-run resume {shlex.quote(str(engine.out))}"


def _exit_code(result: Result) -> int:
    """128 + the signal that stopped the run, whichever rank got it; else 0."""
    stopped = result.status != "finished" and result.reason in signal.Signals.__members__
    return 128 + signal.Signals[result.reason] if stopped else 0


def try_resume(engine: Engine, resume: str, out: Path) -> None:
    """Load what a run would be resumed from, into an engine with another run folder.

    Args:
        engine: an engine that has not trained yet.
        resume: "auto", a path, or the name of one of the run's checkpoints.
        out: the run folder.
    """
    if resume == "auto" and not has_checkpoints(out):
        return
    of_run = [out] if resume == "auto" else sorted(out.glob(f"checkpoints*/{resume}"))
    engine.resume(str(next(iter(of_run), resume)))
    _say(engine, False, f"resumed at step {engine.state.step:,}")


def has_checkpoints(out: Path) -> bool:
    """Whether there is something to resume from, even if only the note of where the run started."""
    return any(out.glob("checkpoints*/*"))


def _has_finished(out: Path, step: int) -> bool:
    """Whether the run in a folder ended at this step, with its last evaluation."""
    summary = Run(out).summary
    return (summary.get("status"), summary.get("steps")) == ("finished", step)


def _finished(engine: Engine, run: RunConfig) -> str:
    longer = shlex.quote(str(replace(run.until, amount=2 * run.until.amount)))
    return (
        f"{engine.out} is finished (until {run.until}); to train further: {_resuming(engine)} "
        f"--set until={longer}; its results: nexus-run runs show {shlex.quote(str(engine.out))}"
    )


def _headline(engine: Engine, run: RunConfig) -> str:
    if run.until.reached(engine.state):
        return f"{engine.out} is already at {run.until}; finishing it"
    trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    return f"training {trained:,} parameters on {engine.device} until {run.until} in {engine.out}"


def _say(engine: Engine, quiet: bool, text: str) -> None:
    if engine.ranks.is_main and not quiet:
        click.echo(text)


def _write_summary(out: Path, result: Result, status: str, reason: str) -> None:
    summary = {
        "status": status,
        "reason": reason,
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "metrics": {n: v if math.isfinite(v) else None for n, v in result.metrics.items()},
    }
    draft = out / ".summary.json.tmp"
    draft.unlink(missing_ok=True)  # also a link, which would be followed
    with draft.open("x", encoding="utf-8") as file:
        file.write(json.dumps(summary, indent=2) + "\n")
    draft.replace(out / "summary.json")


def _report(engine: Engine, result: Result, out: Path, quiet: bool) -> str:
    """The final report: status, results, where they are, and what to do next."""
    how = f" ({result.reason})" if result.reason else ""
    unit = "samples" if result.tokens == engine.state.samples else "tokens"
    headline = (
        f"{result.status}{how} at step {result.step:,}: {result.tokens:,} {unit} "
        f"in {result.seconds:,.0f} s, in {out}"
    )
    if quiet:
        return headline
    rows = {name: f"{value:.4f}" for name, value in result.metrics.items() if "val" in name}
    rows = {name: text for name, text in rows.items() if not _is_said(name, rows)}
    for answer in engine.hook.summarize(engine=engine):
        rows.update(answer)
    config = shlex.quote(str(out / "config.yaml"))
    rows["repeat it"] = f"nexus-run {config} --out ANOTHER_FOLDER"
    if result.status != "finished":
        rows["resume it"] = _resuming(engine)
    width = max(len(name) for name in rows) + 2
    lines = [_row(name, text, width) for name, text in rows.items()]
    return "\n".join(["", click.style(headline, bold=True), *lines])


def _resuming(engine: Engine) -> str:
    """The command that resumes the run."""
    trust = " --trust" if code_of(engine) else ""
    return f"nexus-run resume {shlex.quote(str(engine.out))}{trust}"


def _is_said(name: str, rows: Mapping[str, str]) -> bool:
    """Whether a loss term equals the loss, which already has a row."""
    split, _, metric = name.rpartition("/")
    return metric.endswith("_loss") and rows[name] == rows.get(f"{split}/loss")


def _row(name: str, text: str, width: int) -> str:
    return f"  {name:<{width}}" + folded(_visible(text), width + 2)


def _visible(text: str) -> str:
    """Text with terminal control characters escaped."""
    return "".join(
        repr(sign)[1:-1]
        if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t"
        else sign
        for sign in text
    )
