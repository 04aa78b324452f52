"""How the commands report errors: one line for what the user can mend, a traceback on request."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

from nexus_core.errors import NexusError

__all__ = ["reported"]


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn an error into a message on stderr and an exit code: 2 the user's mistake, 1 a failure.

    Args:
        debug: let the traceback through.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    except NexusError as error:
        if debug:
            traceback.print_exc()
        _say(error, str(error))
        sys.exit(error.exit_code)
    except (click.exceptions.Exit, click.ClickException, SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(error, f"{type(error).__name__}: {error}")
        if not debug:
            click.echo("run it again with --debug to see the traceback", err=True)
        sys.exit(1)


def _show_warning(message: Warning | str, *_: object) -> None:
    click.echo(f"{click.style('warning', fg='yellow')}: {message}", err=True)


def _say(error: Exception, message: str) -> None:
    where = [] if isinstance(error, NexusError) else getattr(error, "__notes__", [])
    places = "".join(f" [{place}]" for place in where)
    click.echo(f"{click.style('error', fg='red', bold=True)}: {message}{places}", err=True)
