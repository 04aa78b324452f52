"""`nexus-run runs`: list the runs below a folder, show one, or plot several."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import click

from nexus_core.cli.chart import NO_PICTURE, Chart, Line, save_picture, text_chart
from nexus_core.cli.errors import reported
from nexus_core.cli.options import PATH
from nexus_core.cli.records import Run, find_runs, open_run
from nexus_core.cli.tables import aligned, as_bytes, as_number, as_time
from nexus_core.errors import ConfigError, suggestion

__all__ = ["key_metric", "list_runs", "main", "plot_runs", "show_run"]

_FIRST = ("val/loss", "val/total_loss", "train/total_loss")
"""Default metrics: the first of these that exists."""


class _Listing(click.Group):
    """A group whose default command lists; `./show` is a folder, not a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asks = {"-h", "--help"} & set(args[:1])
        if not asks and not (args and args[0] in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[FOLDER] | show RUN | plot RUN...")


@click.group(cls=_Listing, name="runs", context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """List the runs below a folder (runs/ if none is given), show one, or plot several.

    \b
    nexus-run runs                                   every run below runs/
    nexus-run runs sweeps/lr --sort val/loss         the best first
    nexus-run runs show runs/mine                    one run in full
    nexus-run runs plot runs/a runs/b -m val/loss    both in one chart
    """


@main.command("list")
@click.argument("folder", type=PATH, default="runs")
@click.option("-m", "--metric", "metrics", multiple=True, metavar="NAME",
              help="Metric to show; may be repeated.")  # fmt: skip
@click.option(
    "--sort", metavar="NAME", help="Sort by this metric, smallest first; -NAME: largest first."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _list(
    folder: Path, metrics: tuple[str, ...], sort: str | None, as_json: bool, debug: bool
) -> None:
    """List every run below a folder: status, step, metrics, lineage, size."""
    with reported(debug):
        runs = find_runs(folder)
        if sort is not None:
            runs = _sorted(runs, sort)
        if as_json:
            click.echo(json.dumps([_facts(run) for run in runs], indent=2))
            return
        named = sort.removeprefix("-") if sort else None
        click.echo(list_runs(runs, folder, metrics or ((named,) if named else ())))


@main.command("show")
@click.argument("run", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _show(run: Path, as_json: bool, debug: bool) -> None:
    """Show one run: status, metrics, checkpoints, lineage and settings."""
    with reported(debug):
        found = open_run(run)
        if as_json:
            whole = {**_facts(found), "settings": found.settings, "files": _files(found)}
            click.echo(json.dumps(whole, indent=2))
            return
        click.echo(show_run(found))


@main.command("plot")
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("-m", "--metric", metavar="NAME", help="Default: val/loss if there is one.")
@click.option("--x", "over", type=click.Choice(["step", "tokens"]), default="step",
              show_default=True, help="The x axis.")  # fmt: skip
@click.option("--log", "is_log", is_flag=True, help="Plot its logarithm.")
@click.option("--png", type=PATH, metavar="FILE.png", help="Also save it as this PNG file.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _plot(
    runs: tuple[Path, ...], metric: str | None, over: str, is_log: bool, png: Path | None,
    debug: bool,
) -> None:  # fmt: skip
    """Plot a metric of several runs in the terminal, and as a PNG with --png.

    A folder of runs stands for all runs in it.
    """
    with reported(debug):
        found = [run for path in runs for run in _runs_at(path)]
        click.echo(plot_runs(found, metric, over=over, is_log=is_log, png=png))


def list_runs(runs: Sequence[Run], folder: Path, metrics: Sequence[str] = ()) -> str:
    """List runs, one line each.

    Args:
        runs: the runs below the folder.
        folder: as given by the user.
        metrics: metrics to show; empty: one that most runs have.

    Raises:
        ConfigError: no run has one of the metrics.
    """
    if not runs:
        return f"no runs below {folder}"
    for metric in metrics:
        _check_metric(metric, runs)
    shown = metrics or [name for name in [key_metric(runs)] if name]
    rows = [["run", "status", "step", *shown, "seed", "time", "size", "from"]]
    for run in runs:
        values = [as_number(run.last_metrics.get(name)) for name in shown]
        facts = [str(run.seed), as_time(run.seconds), as_bytes(run.size)]
        rows.append([run.name, run.status, f"{run.step:,}", *values, *facts, _origin(run)])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    numbers = range(2, 6 + len(shown))
    counts = {run.status: sum(r.status == run.status for r in runs) for run in runs}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    total = as_bytes(sum(run.size for run in runs))
    plural = "run" if len(runs) == 1 else "runs"
    return f"{aligned(rows, numbers)}\n{len(runs)} {plural} below {folder}: {said}; {total}"


def show_run(run: Run) -> str:
    """Everything known about a run, in words."""
    how = run.status + (f" ({run.reason})" if run.reason else "")
    facts = {
        "status": how,
        "step": f"{run.step:,}" + (f", {run.tokens:,} tokens" if run.tokens else ""),
        "until": str(run.settings.get("until", "")),
        "seed": str(run.seed),
        "time": as_time(run.seconds),
        "size": as_bytes(run.size),
        "data": run.data.fingerprint or "",
        "checkpoints": ", ".join(f"{int(path.name[5:]):,}" for path in run.checkpoints),
        "from": _origin(run),
    }
    lines = [run.name, *_rows({key: text for key, text in facts.items() if text})]
    if run.lineage.parent is not None:
        lines += ["changed", *_rows(_in_words(run.lineage.parent.changes))]
    if run.lineage.branches:
        lines += ["branches", *(f"  at {b.step:,}  {b.run}" for b in run.lineage.branches)]
    if metrics := run.last_metrics:
        best = {name: min(points, key=lambda p: p.value) for name, points in run.series.items()}
        table = [["metric", "last", "least", "at step"]]
        for name, value in metrics.items():
            low = best.get(name)
            ends = [as_number(low.value), f"{low.step:,}"] if low else ["", ""]
            table.append([name, as_number(value), *ends])
        lines += ["", aligned(table, (1, 2, 3))]
    lines += ["", f"settings: {run.path / 'config.yaml'}"]
    return "\n".join(lines)


def plot_runs(
    runs: Sequence[Run], metric: str | None = None, *, over: str = "step", is_log: bool = False,
    png: Path | None = None,
) -> str:  # fmt: skip
    """Plot a metric of several runs.

    Args:
        runs: the runs to plot, one line each.
        metric: name of the metric; None: one that most runs have.
        over: "step" or "tokens".
        is_log: whether to plot log10 of the values.
        png: file for the chart as a PNG; None: no PNG.

    Raises:
        ConfigError: no run has the metric.
    """
    name = metric or key_metric(runs)
    if name is None:
        raise ConfigError("none of these runs has a metric yet; train for some steps")
    _check_metric(name, runs)
    lines, lacking = [], []
    for run in runs:
        points = run.series.get(name, ())
        kept = [point for point in points if point.value > 0 or not is_log]
        if not kept:
            lacking.append(run.name)
            continue
        values = [math.log10(p.value) if is_log else p.value for p in kept]
        lines.append(Line(run.name, [float(getattr(p, over)) for p in kept], values))
    if not lines:
        raise ConfigError(f"no run has values of {name} that can be plotted; drop --log")
    said = [f"without {name}: {', '.join(lacking)}"] if lacking else []
    low, high = (pick(v for line in lines for v in line.y) for pick in (min, max))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    label = f"log10 of {name}" if is_log else name
    chart = Chart(lines, over, label, (low - margin, high + margin))
    if png is not None:
        said.append(f"PNG: {save_picture(chart, png) or NO_PICTURE}")
    letters = f"{ascii_lowercase:<{len(lines)}}" if len(lines) > 1 else " "
    ends = {
        f"{letter} {line.label}".strip(): f"{as_number(line.y[-1])} at {over} {line.x[-1]:,.0f}"
        for letter, line in zip(letters, lines, strict=False)
    }
    return "\n".join([text_chart(chart), *_rows(ends), *said])


def key_metric(runs: Iterable[Run]) -> str | None:
    """The default metric: an evaluation metric that most runs have."""
    names: dict[str, int] = {}
    for run in runs:
        for name in run.last_metrics:
            names[name] = names.get(name, 0) + 1
    most = max(names.values(), default=0)
    shared = [name for name, count in names.items() if count == most]
    measured = [name for name in shared if name.startswith("val")]
    return next((name for name in (*_FIRST, *measured, *shared) if name in shared), None)


def _check_metric(name: str, runs: Sequence[Run]) -> None:
    known = list(dict.fromkeys(key for run in runs for key in run.last_metrics))
    if name not in known:
        raise ConfigError(
            f"no run here has a metric '{name}'.{suggestion(name, known)} "
            f"There are: {', '.join(known) or 'none yet'}"
        )


def _sorted(runs: Sequence[Run], key: str) -> list[Run]:
    """Sort by a metric; runs without it come last."""
    name, sign = key.removeprefix("-"), -1 if key.startswith("-") else 1
    _check_metric(name, runs)
    return sorted(runs, key=lambda run: sign * run.last_metrics.get(name, sign * math.inf))


def _runs_at(path: Path) -> list[Run]:
    if (path / "config.yaml").is_file():
        return [open_run(path)]
    runs = find_runs(path)
    if not runs:
        raise ConfigError(f"no runs below '{path}'")
    return [Run(run.path, str(run.path)) for run in runs]


def _origin(run: Run) -> str:
    parent = run.lineage.parent
    return f"{parent.run}@{parent.step}" if parent is not None else ""


def _in_words(changes: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
    return {key: f"{json.dumps(a)} -> {json.dumps(b)}" for key, (a, b) in changes.items()}


def _rows(facts: Mapping[str, str]) -> list[str]:
    width = max(map(len, facts), default=0) + 2
    return [f"  {name:<{width}}{text}" for name, text in facts.items()]


def _files(run: Run) -> dict[str, int]:
    return {
        str(path.relative_to(run.path)): path.lstat().st_size
        for path in sorted(run.path.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _facts(run: Run) -> dict[str, Any]:
    parent = run.lineage.parent
    return {
        "run": run.name,
        "path": str(run.path),
        "status": run.status,
        "reason": run.reason,
        "step": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "seed": run.seed,
        "size": run.size,
        "metrics": dict(run.last_metrics),
        "checkpoints": [str(path.relative_to(run.path)) for path in run.checkpoints],
        "parent": {"run": parent.run, "step": parent.step} if parent is not None else None,
        "branches": [{"run": b.run, "step": b.step} for b in run.lineage.branches],
    }
