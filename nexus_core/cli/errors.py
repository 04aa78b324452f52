"""How the commands report errors: one line for what the user can fix, a traceback with --debug."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from nexus_core.cli.tables import folded
from nexus_core.errors import NexusError, suggestion

__all__ = ["Group", "reported", "run_command"]


@contextmanager
def reported(debug: bool, failure: int = 1) -> Iterator[None]:
    """Turn an error into a message on stderr and an exit code: 2 the user's mistake, 1 a failure.

    Args:
        debug: let the traceback through.
        failure: the exit code of a failure; 2 if 1 is a regular result of the command.
    """
    _take_any_output()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    except NexusError as error:
        if debug:
            traceback.print_exc()
        if not _said_by_main(said := error.on_command_line()):
            _say(error, said)
        sys.exit(max(error.exit_code, failure))
    except (click.exceptions.Exit, click.ClickException, SystemExit, KeyboardInterrupt):
        raise
    except BrokenPipeError:
        raise  # click exits silently, for `nexus-run | head`
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(error, f"{type(error).__name__}: {error}", _place_of(error))
        if not debug:
            click.echo("run it again with --debug to see the traceback", err=True)
        sys.exit(failure)


class Group(click.Group):
    """A group of commands whose errors are one line."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command, as `click.Group.main` does."""
        run_command(partial(super().main, *args, **options))


def run_command(main: Callable[..., Any]) -> NoReturn:
    """Run a click command, and report what click refuses as one line, like other errors.

    Args:
        main: `main` of the command, with all arguments except `standalone_mode`.
    """
    try:
        code = main(standalone_mode=False)
    except click.Abort:
        click.echo("Aborted!", err=True)
        sys.exit(1)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and type(error).__name__ != "NoArgsIsHelpError":
            _print("error", _of_usage(error), fg="red", bold=True)
        else:  # the help, or a file that cannot be opened
            error.show()
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _of_usage(error: click.UsageError) -> str:
    """What is wrong in the words of a command, what is expected, and where to read about it."""
    said, name = error.format_message(), Path(sys.argv[0]).name
    if isinstance(error, click.NoSuchOption):
        said = f"{error.message}{suggestion(error.option_name, error.possibilities or [])}"
    if error.ctx is not None:
        name = error.ctx.command_path
        if type(error) in (click.UsageError, click.MissingParameter):
            said = f"{said.rstrip('.')}. Expected: {' '.join(error.ctx.get_usage().split()[1:])}"
    end = "" if said.endswith(("?", ".")) else "."
    return f"{said[:1].lower()}{said[1:]}{end} See: {name} --help"


def _take_any_output() -> None:
    """Escape characters that the terminal cannot show, and respect NO_COLOR."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    context = click.get_current_context(silent=True)
    if context is not None and os.environ.get("NO_COLOR"):  # see https://no-color.org
        context.color = False


def _show_warning(message: Warning | str, *_: object) -> None:
    _print("warning", str(message), fg="yellow")


def _said_by_main(message: str) -> bool:
    """Whether rank 0 of this run reports the same error."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    from nexus_core.cli.distributed import said_by_main  # needs torch, which is slow to import

    return said_by_main(message)


def _say(error: Exception, message: str, line: str = "") -> None:
    where = [] if isinstance(error, NexusError) else getattr(error, "__notes__", [])
    places = "".join(f" [{place}]" for place in (*where, line) if place)
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    head = "error" if rank == "0" else f"error in rank {rank}"
    _print(head, f"{message}{places}", fg="red", bold=True)


def _place_of(error: Exception) -> str:
    """The last line outside installed packages, which is the user's own code, if there is one."""
    import sysconfig  # only needed here

    installed = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
    ours = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", ours, *installed)):
            file, here = Path(frame.filename), Path.cwd()
            shown = file.relative_to(here) if file.is_relative_to(here) else file
            return f"{shown}:{frame.lineno}, in {frame.name}"
    return ""


def _print(head: str, text: str, *, fg: str, bold: bool = False) -> None:
    lines = folded(f"{head}: {text}", stream=sys.stderr).removeprefix(head)
    click.echo(click.style(head, fg=fg, bold=bold) + lines, err=True)
