"""Shows on the terminal, or in a log of plain lines, how the run goes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from pydantic import Field
from tqdm import tqdm

from nexus_core import Every, Interval, IntervalField, Logger, LoggerConfig

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["ConsoleConfig", "ConsolePlugin"]

BAR = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]{postfix}"
COLUMNS_WHERE_UNKNOWN = 100  # some containers give their terminal no width
SPEED = "system/throughput_tokens_per_sec"
HASH = "weights/hash"
HEADLINE = "/bits_per_byte"


class ConsoleConfig(LoggerConfig):
    """Settings of the console."""

    every: IntervalField | None = Field(
        Interval(10, "seconds"),
        description="shortest distance of two plain lines (a bar ignores it); null: every log",
        json_schema_extra={"resume": "ignored"},
    )
    quiet: bool = Field(False, description="show nothing", json_schema_extra={"resume": "ignored"})
    verbose: bool = Field(
        False,
        description="show every metric of an evaluation, each loss term too",
        json_schema_extra={"resume": "ignored"},
    )


class ConsolePlugin(Logger[ConsoleConfig]):
    """Shows loss, learning rate, speed and the time that is left; changes nothing in training.

    On a terminal: a bar on the error stream, in the unit of the horizon, with a line above it
    for each evaluation. Elsewhere: plain lines on the output stream, where `every` holds lines
    back, but never the first and the last. Works only when the engine logs.
    """

    _bar: tqdm[Any] | None = None
    _due: Every | None = None
    _held_back: str | None = None
    _began = _began_at = 0.0

    def open(self, engine: Engine) -> None:
        """Show how far the run is."""
        self._began, self._began_at = time.monotonic(), _share(engine)
        self._due = self._held_back = None
        if engine.horizon and sys.stderr and sys.stderr.isatty() and not self.config.quiet:
            total = engine.horizon.amount
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            self._bar = tqdm(
                total=_short(total),
                initial=_done(engine),
                unit=engine.horizon.unit,
                unit_scale=total >= 100_000,
                bar_format=BAR,
                ncols=None if columns else COLUMNS_WHERE_UNKNOWN,
                dynamic_ncols=columns > 0,
                file=sys.stderr,
            )

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Move the bar, or print a line where one is due."""
        if self.config.quiet:
            return
        if self._bar is not None:
            self._bar.n = _done(engine)
            self._bar.set_postfix_str("  ".join(_parts(metrics)))
            return
        line = "  ".join([_place(engine), *_parts(metrics), *self._time_left(engine)])
        if self._due is None:
            every = self.config.every and self.config.every.of(engine.horizon)
            self._due = Every(every, engine.state)
        elif self.config.every is not None and not self._due.due(engine.state):
            self._held_back = line
            return
        self._held_back = None
        _print(line)

    def write_evaluation(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Print a line, above the bar where there is one."""
        if self.config.quiet:
            return
        shown = metrics if self.config.verbose else _headlines(metrics)
        values = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        line = f"{_place(engine)}  {values}"
        if self._bar is not None:
            tqdm.write(line, file=sys.stderr)
        else:
            _print(line)

    def close(self, engine: Engine) -> None:
        """Leave the last state on the screen."""
        if self._held_back is not None:
            _print(self._held_back)
            self._held_back = None
        if self._bar is not None:
            self._bar.n = _done(engine)
            self._bar.close()
            self._bar = None

    def _time_left(self, engine: Engine) -> Iterator[str]:
        share = _share(engine)
        if self._began_at < share < 1:
            spent = time.monotonic() - self._began
            left = spent * (1 - share) / (share - self._began_at)
            yield f"{tqdm.format_interval(left)} left"


def _print(line: str) -> None:
    """Print a line, with an escape for each character that the output stream has not."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # there may be no stream at all
    click.echo(line.encode(encoding, "backslashreplace").decode(encoding))


def _place(engine: Engine) -> str:
    step = f"step {engine.state.step:,}"
    if engine.horizon is None:
        return step
    if engine.horizon.unit == "steps":
        return f"{step}/{engine.horizon.amount:,.0f}"
    return f"{step}  {_share(engine):.1%} of {engine.horizon}"


def _parts(metrics: Mapping[str, float]) -> Iterator[str]:
    if "train/total_loss" in metrics:
        yield f"loss {metrics['train/total_loss']:.4f}"
    if "train/learning_rate" in metrics:
        yield f"lr {metrics['train/learning_rate']:.2e}"
    if SPEED in metrics:
        yield f"{metrics[SPEED]:,.0f} tokens/s"
    if HASH in metrics:
        yield f"weights {int(metrics[HASH]):012x}"


def _headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """What an evaluation comes to: of each set the loss, and what is no loss term before it."""
    best = sorted(metrics, key=lambda name: (name.endswith("loss"), not name.endswith(HEADLINE)))
    found = {name: metrics[name] for name in best if not name.endswith("_loss")}
    return found or dict(metrics)


def _done(engine: Engine) -> float:
    """How much of the horizon's unit is done, not more than the horizon."""
    assert engine.horizon is not None
    return _short(min(engine.state.counted(engine.horizon.unit), engine.horizon.amount))


def _short(number: float) -> float:
    return int(number) if number == int(number) else round(number, 2)


def _share(engine: Engine) -> float:
    return engine.horizon.progress(engine.state) if engine.horizon else 0.0
