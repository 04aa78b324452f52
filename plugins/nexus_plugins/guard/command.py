"""`nexus-run replay`: a recorded bad step, done again."""

from __future__ import annotations

from pathlib import Path

import click

from nexus_core.cli.errors import reported

__all__ = ["main"]


@click.command(name="replay", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(record: Path, debug: bool) -> None:
    """Do a recorded step again and name the first module and loss term with a bad number.

    RECORD is a folder that the guard wrote: OUT/guard/step-00000123. Nothing is changed.
    """
    with reported(debug):
        from nexus_core.cli.build import build_plugins, make_engine
        from nexus_core.cli.settings import read_settings
        from nexus_core.errors import CheckpointError
        from nexus_plugins.guard.replay import replay

        out = record.resolve().parents[1]
        if not (out / "config.yaml").is_file():
            raise CheckpointError(
                f"'{record}' is not a record of a run: there is no config.yaml two folders above; "
                "expected OUT/guard/step-00000123"
            )
        settings = read_settings(str(out / "config.yaml"))
        click.echo(replay(make_engine(build_plugins(settings), out), record))
