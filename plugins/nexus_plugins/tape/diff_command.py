"""`nexus-run diff`: where two runs, or a run and its re-execution, first differ, and why."""

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
    from nexus_plugins.tape.diff import Finding

__all__ = ["main"]


@click.command(name="diff", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("one", metavar="RUN_A", type=PATH)
@click.argument("other", metavar="[RUN_B]", type=PATH, required=False)
@click.option("--trust", is_flag=True, help="Load the local code that their configs name.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(one: Path, other: Path | None, trust: bool, as_json: bool, debug: bool) -> None:
    """Find the first step at which two runs differ, the first tensor in it, and the likely cause.

    With one run, compare it with its own re-execution.

    Settings, code, versions, data and environment are compared first, then the tapes of both runs.
    The first step that differs is repeated from the nearest checkpoints, in temporary folders; if a
    run has no tape, the steps between checkpoints are. A single run is re-executed completely, and
    its tape, metrics and checkpoints are compared. The runs are not modified. The exit code is 0 if
    no step differs, 1 if one does, 2 after an error.
    """
    with reported(debug, failure=2):
        from nexus_plugins.tape.again import Recorded
        from nexus_plugins.tape.diff import diff
        from nexus_plugins.tape.itself import diff_itself

        run = Recorded.at(one, trust=trust)
        finding = diff(run, Recorded.at(other, trust=trust)) if other else diff_itself(run)
        click.echo(_as_json(finding) if as_json else "\n".join(_lines(finding)))
        sys.exit(0 if finding.equal else 1)


def _as_json(finding: Finding) -> str:
    return json.dumps({"equal": finding.equal, **dataclasses.asdict(finding)}, indent=2)


def _lines(finding: Finding) -> Iterator[str]:
    for fact in finding.facts:
        yield f"  {fact}"
    if finding.equal:
        yield f"no step differs, of {finding.compared:,}"
    else:
        yield f"first difference: step {finding.step:,}" if finding.step else ""
        rows = {
            "phase": finding.phase,
            "in": finding.module,
            "what": finding.tensor,
            "is": " | ".join(dict.fromkeys(filter(None, finding.about))),
            "largest difference": "" if finding.largest is None else f"{finding.largest:.6g}",
            "likely cause": finding.cause,
        }
        for name, text in rows.items():
            if text:
                yield f"  {name:<20}{text}"
    for note in finding.notes:
        yield f"  {note}"
