"""Shows the progress of the run on the terminal, in a notebook, or as plain lines."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click
from pydantic import Field
from tqdm import tqdm

from nexus_core import Every, Interval, IntervalField, Logger, LoggerConfig, hookimpl
from nexus_plugins.console.above import above
from nexus_plugins.console.notebook import NotebookBar, in_notebook
from nexus_plugins.console.words import done, evaluated, parts, place, share, short

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["ConsoleConfig", "ConsolePlugin"]

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]{postfix}"
NARROWEST = 4  # minimum columns of the bar; metrics are dropped first
COLUMNS_WHERE_UNKNOWN = 100  # some containers report no terminal width


class ConsoleConfig(LoggerConfig):
    """Settings of the console."""

    every: IntervalField | None = Field(
        default=Interval(10, "seconds"),
        description="minimum interval between plain lines (ignored by the bar); null: every log",
        json_schema_extra={"resume": "ignored"},
    )
    quiet: bool = Field(
        default=False, description="show nothing", json_schema_extra={"resume": "ignored"}
    )
    verbose: bool = Field(
        default=False,
        description="show every metric of an evaluation, including each loss term",
        json_schema_extra={"resume": "ignored"},
    )


class ConsolePlugin(Logger[ConsoleConfig]):
    """Shows loss, learning rate, speed and remaining time; does not affect training.

    On a terminal: a bar on the error stream that moves with each step, in the unit of the horizon,
    below a line for each evaluation and what the program prints. In a notebook: a bar, with these
    lines below it. Elsewhere: plain lines on the output stream; `every` limits them, except for the
    first, the last, and the one before an evaluation. Metrics are those that the engine logs, to
    four digits; loggers store all of them.
    """

    config_class = ConsoleConfig
    _bar: tqdm[Any] | None = None
    _redirected: ExitStack | None = None
    _due: Every | None = None
    _held_back: str | None = None
    _began = _began_at = 0.0

    def open(self, engine: Engine) -> None:
        """Show how far the run is."""
        self._began, self._began_at = time.monotonic(), share(engine)
        self._due = self._held_back = None
        if engine.horizon and not self.config.quiet:
            self._bar = _bar(engine.horizon, done(engine))
        if self._bar is not None and not isinstance(self._bar, NotebookBar):
            self._redirected = above(self._bar)

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Move the bar, which is redrawn at most ten times a second."""
        if self._bar is None or self.switched_off:
            return
        try:
            self._bar.update(done(engine) - self._bar.n)
        except Exception as error:  # a closed terminal must not end a run
            self._attempted("move its bar", engine.state.step, error)

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Show the metrics next to the bar, or print a line if due."""
        if self.config.quiet:
            return
        if self._bar is not None:
            self._bar.n = done(engine)
            self._bar.set_postfix_str(_fitting(self._bar, parts(metrics)))
            return
        line = "  ".join([place(engine), *parts(metrics), *self._time_left(engine)])
        if self._due is None:
            every = self.config.every and self.config.every.of(engine.horizon)
            self._due = Every(every, engine.state)
        elif self.config.every is not None and not self._due.due(engine.state):
            self._held_back = line
            return
        self._held_back = None
        _print(line)

    def write_evaluation(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Print a line for each set, above the bar if there is one."""
        if self.config.quiet:
            return
        self._print_held_back()
        for values in evaluated(metrics, verbose=self.config.verbose):
            line = f"{place(engine)}  {values}"
            if self._bar is not None and not isinstance(self._bar, NotebookBar):
                folded = textwrap.fill(line, _columns(self._bar), subsequent_indent="  ")
                tqdm.write(folded, file=self._bar.fp)
            else:
                _print(line)

    def close(self, engine: Engine) -> None:
        """Leave the final state on the screen."""
        self._print_held_back()
        if self._redirected is not None:
            self._redirected.close()
            self._redirected = None
        if self._bar is not None:
            self._bar.n = done(engine)
            self._bar.close()
            self._bar = None

    def _print_held_back(self) -> None:
        if self._held_back is not None:
            _print(self._held_back)
            self._held_back = None

    def _time_left(self, engine: Engine) -> Iterator[str]:
        now = share(engine)
        if self._began_at < now < 1:
            spent = time.monotonic() - self._began
            left = spent * (1 - now) / (now - self._began_at)
            yield f"{tqdm.format_interval(left)} left"


def _bar(horizon: Interval, begun: float) -> tqdm[Any] | None:
    """The progress bar; None if the output does not support one."""
    options: dict[str, Any] = {
        "total": short(horizon.amount),
        "initial": begun,
        "unit": horizon.unit,
        "unit_scale": horizon.amount >= 100_000,
        "smoothing": 0,  # the mean speed, unaffected by single evaluations
    }
    if in_notebook():
        return NotebookBar(**options)
    if not (sys.stderr and sys.stderr.isatty()):
        return None
    columns = _width()
    return tqdm(
        **options,
        bar_format=BAR,
        ncols=None if columns else COLUMNS_WHERE_UNKNOWN,
        dynamic_ncols=columns > 0,
        file=sys.stderr,
    )


def _width() -> int:
    """Columns of the terminal; 0: unknown, for example if the stream is wrapped."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def _print(line: str) -> None:
    """Print a line, escaping characters that the stream's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # sys.stdout may be None
    click.echo(line.encode(encoding, "backslashreplace").decode(encoding))


def _columns(bar: tqdm[Any]) -> int:
    return bar.format_dict["ncols"] or COLUMNS_WHERE_UNKNOWN


def _fitting(bar: tqdm[Any], shown: Iterable[str]) -> str:
    """The first parts that fit next to the bar."""
    narrow = {"bar_format": BAR.replace("{bar}", "." * NARROWEST), "postfix": "", "ncols": None}
    room = _columns(bar) - len(bar.format_meter(**{**bar.format_dict, **narrow}))
    fitting = ""
    for part in shown:
        longer = f"{fitting}  {part}" if fitting else part
        if len(f", {longer}") > room:
            break
        fitting = longer
    return fitting
