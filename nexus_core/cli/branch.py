"""`nexus-run branch`: a new run that continues from a checkpoint of another, with changed settings.

What the settings do not change stays bitwise identical: rows, dropout, noise.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_core.cli.errors import reported
from nexus_core.cli.options import PATH

if TYPE_CHECKING:
    from nexus_core.cli.build import Build
    from nexus_core.cli.lineage import Relation
    from nexus_core.cli.recorded import Saved
    from nexus_core.engine import Engine

__all__ = ["branch", "branch_off", "main"]

_STAMP = re.compile(r"-\d{8}-\d{6}(-\d+)?$")


def branch(made: Build, saved: Saved, *, quiet: bool) -> int:
    """Continue training from another run's checkpoint, in a new folder.

    Args:
        made: the branch's build.
        saved: the checkpoint to continue from.
        quiet: print only the final line.

    Returns:
        The exit code, as for a run.
    """
    from nexus_core.cli import session
    from nexus_core.cli.build import make_engine
    from nexus_core.cli.folder import run_folder

    name = _STAMP.sub("", saved.run.name)
    with run_folder(replace(made, name=f"{name}-branch"), None) as folder:
        engine = make_engine(made, folder.path)
        folder.parent = parent = branch_off(engine, saved)
        if engine.ranks.is_main and not quiet:
            click.echo(f"branched off {saved.run} at step {engine.state.step:,}")
            for key, (before, after) in parent.changes.items():
                click.echo(f"  {key}: {_shown(before)} -> {_shown(after)}")
        return session.train(engine, made.run, None, folder, quiet=quiet)


def branch_off(engine: Engine, saved: Saved) -> Relation:
    """Load another run's checkpoint into the branch's engine; returns how the two relate."""
    from nexus_core.cli.lineage import Relation, changes
    from nexus_core.cli.recorded import settings_in

    load_apart(engine, saved.path)
    changed = changes(settings_in(saved.config), engine.config)
    place = str(saved.path.relative_to(saved.run))
    return Relation(str(saved.run), engine.state.step, place, changed)


def load_apart(engine: Engine, checkpoint: Path) -> None:
    """Load another run's checkpoint without the state of plugins that only observe."""
    from nexus_core.cli.recorded import without_watchers

    snapshot = engine.hook.load_snapshot(engine=engine, source=str(checkpoint))
    watching = {n: bool(getattr(p, "only_watches", False)) for n, p in engine.plugins.items()}
    engine.load_state_dict(without_watchers(snapshot, watching))


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return "on" if isinstance(value, dict) else f"{value!s:.80}"


@click.command(name="branch", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="RUN@STEP")
@click.option("-p", "--plugins", default="",
              help="Add plugins by name or file, or leave some out: a,./my.py,no:c.")  # fmt: skip
@click.option("-s", "--set", "sets", multiple=True, metavar="KEY=VALUE",
              help="Change a setting, as in nexus-run.")  # fmt: skip
@click.option("--out", type=PATH, help="Folder of the branch.")
@click.option("--resume-policy", type=click.Choice(["exact", "compatible", "force"]),
              help="What may differ from the original run besides settings; default 'compatible' "
              "with --plugins.")  # fmt: skip
@click.option("--trust", is_flag=True, help="Load the local code that its config names.")
@click.option("--quiet", is_flag=True, help="Print only errors and the final line.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(
    source: str,
    plugins: str,
    sets: tuple[str, ...],
    out: Path | None,
    resume_policy: str | None,
    trust: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Continue from a checkpoint in a new run, with changed settings.

    RUN@STEP is a run's folder and the step of a checkpoint: runs/mine@5000, runs/mine@best, or
    runs/mine for the newest. Everything you do not change stays bitwise identical: rows, dropout,
    noise. Both run folders record where the branch comes from (lineage.jsonl).

    \b
    nexus-run branch runs/mine@5000 --set lr=1e-4
    nexus-run branch runs/mine@5000 --set until="8000 steps" --out runs/longer
    """
    with reported(debug):
        from nexus_core.cli import distributed
        from nexus_core.cli.build import build_plugins
        from nexus_core.cli.recorded import only_trusted, saved_at
        from nexus_core.cli.settings import read_settings
        from nexus_core.paths import expanded
        from nexus_core.plan import answering

        saved = saved_at(expanded(source))
        values: dict[str, object] = {"out": out}
        if policy := resume_policy or (plugins and "compatible"):
            values[f"{answering('load_snapshot').name}.resume_policy"] = policy
        with only_trusted(saved.run, trust=trust):
            settings = read_settings(
                str(saved.config), plugins, sets, os.environ, values, trusted=trust
            )
            made = build_plugins(settings)
            code = branch(made.quiet() if quiet else made, saved, quiet=quiet)
        del made  # releases what plugins hold of the process group
        distributed.leave()
        sys.exit(code)


if __name__ == "__main__":
    main()
