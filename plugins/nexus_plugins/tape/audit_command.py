"""`nexus-run audit`: verify a run by re-executing parts of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_core.cli.errors import reported
from nexus_core.cli.options import PATH

if TYPE_CHECKING:
    from nexus_plugins.tape.audit import Audit

__all__ = ["main"]

SHARES = (0.01, 0.05, 0.1, 0.25)


@click.command(name="audit", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", metavar="RUN", type=PATH)
@click.option("--segments", default=3, show_default=True, type=click.IntRange(min=1),
              help="Number of intervals between checkpoints to re-execute.")  # fmt: skip
@click.option("--seed", type=int, help="Seed for choosing intervals; default: random.")
@click.option("--trust", is_flag=True, help="Load the local code that its config names.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(
    run: Path, segments: int, seed: int | None, trust: bool, as_json: bool, debug: bool
) -> None:
    """Re-execute random intervals of a run and compare them with its records.

    Checkpoints, tape and metrics of each interval must be bitwise identical, on a machine like the
    one that the run was made on. The run is not modified. The exit code is 0 if everything was
    reproduced, 1 if something was not, 2 after an error.
    """
    with reported(debug, failure=2):
        from nexus_plugins.tape.again import Recorded
        from nexus_plugins.tape.audit import audit

        report = audit(Recorded.at(run, trust=trust), segments, seed)
        click.echo(_as_json(report) if as_json else "\n".join(_lines(report)))
        sys.exit(0 if report.holds else 1)


def _as_json(report: Audit) -> str:
    return json.dumps({"holds": report.holds, **dataclasses.asdict(report)}, indent=2)


def _lines(report: Audit) -> Iterator[str]:
    from nexus_plugins.tape.audit import unseen

    for fault in report.faults:
        yield f"  FALSE  {fault}"
    for part in report.intervals:
        verdict = "FALSE" if part.faults else "same "
        yield f"  {verdict}  steps {part.begin + 1:,} to {part.end:,}"
        for said in (*part.faults, *part.notes):
            yield f"         {said}"
    count = len(report.intervals)
    if count == report.of:
        yield f"all {count} intervals of the run were re-executed"
        return
    yield f"{count} of {report.of} intervals were re-executed; the probability that they"
    yield "miss a run in which this share is falsified:"
    for share in SHARES:
        yield f"  {share:4.0%}  {unseen(share, count):.3g}"
