"""`nexus-run replay`: repeat a recorded bad step."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from nexus_core.cli.errors import reported

__all__ = ["main"]

UNTRUSTED = "the run's config loads it; if it is your own code, add --trust"
_CONFIG_LIMIT = 1 << 20
_PLACE = re.compile(r"(^|_)(file|dir|folder)$")
"""Settings that name a path where a plugin writes."""


@click.command(name="replay", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--trust", is_flag=True,
              help="Use code and folders outside the run that its config names.")  # fmt: skip
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(record: Path, trust: bool, debug: bool) -> None:
    """Repeat a recorded step and name the first module and loss term with a non-finite number.

    RECORD is a folder that the guard wrote: OUT/guard/step-00000123. Nothing is modified; if the
    config names a folder outside the run, such as a cache, an empty one is used instead. If the
    config names code of your own, add --trust.
    """
    from nexus_core.places import only_named

    with (
        reported(debug),
        tempfile.TemporaryDirectory(prefix="nexus-replay-") as room,
        nullcontext() if trust else only_named((), UNTRUSTED),
    ):
        from nexus_core.cli.build import build_plugins, make_engine
        from nexus_core.cli.settings import read_settings
        from nexus_plugins.guard.replay import replay

        out = _run_of(record)
        settings = read_settings(str(out / "config.yaml"), trusted=trust)
        if not trust:
            for name, block in settings.run.plugins.items():
                _keep_within(block, out, Path(room) / name)
        click.echo(replay(make_engine(build_plugins(settings), out), record))


def _run_of(record: Path) -> Path:
    """The run of a record; its config must be a regular file."""
    from nexus_core.errors import CheckpointError
    from nexus_plugins._shared.files import read_small

    out = record.resolve().parent.parent
    config = out / "config.yaml"
    try:
        read_small(config, _CONFIG_LIMIT)  # rejects links and pipes
    except FileNotFoundError:
        raise CheckpointError(
            f"'{record}' is not a record of a run: no config.yaml two folders above; "
            "expected OUT/guard/step-00000123"
        ) from None
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{config} is not the config of a run: ", *error.args) from error
    return out


def _keep_within(block: dict[str, Any], out: Path, room: Path) -> None:
    """Replace paths outside the run by paths in a temporary folder."""
    for key, value in block.items():
        if isinstance(value, dict):
            _keep_within(value, out, room)
        elif isinstance(value, str) and _PLACE.search(key) and not _within(value, out):
            block[key] = str(room / key)


def _within(place: str, out: Path) -> bool:
    """Whether a path is in the run, relative to the run or to the current folder."""
    path = os.path.expandvars(Path(place).expanduser())
    return all((root / path).resolve().is_relative_to(out.resolve()) for root in (out, Path()))
