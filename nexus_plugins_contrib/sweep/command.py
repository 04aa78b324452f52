"""`nexus-run sweep`: search settings, each trial an ordinary run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_core.cli.errors import reported
from nexus_core.cli.options import PATH

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nexus_plugins_contrib.sweep.study import Search

__all__ = ["main"]

_SHOWN = 5  # best trials in the report


@click.command(name="sweep", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", required=False, metavar="[CONFIG|PRESET]")
@click.option("--over", "spaces", multiple=True, required=True, metavar="KEY=SPACE",
              help="Search a setting: log(1e-4,1e-2), uniform(0,1), int(1,8), intlog(16,1024), "
              "choice(a,b); may be repeated.")  # fmt: skip
@click.option("--trials", default=20, show_default=True, type=click.IntRange(min=1),
              help="Total number of trials, including earlier calls.")  # fmt: skip
@click.option("-m", "--metric", default="val/loss", show_default=True,
              help="Trials are ranked by its last value.")  # fmt: skip
@click.option("--mode", type=click.Choice(["min", "max"]), default="min", show_default=True,
              help="Whether to minimize or maximize the metric.")  # fmt: skip
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1),
              help="Trials to run in parallel; they share the cores.")  # fmt: skip
@click.option("--sampler", type=click.Choice(["tpe", "random"]), default="tpe", show_default=True,
              help="Sampler of values.")  # fmt: skip
@click.option("--pruner", type=click.Choice(["median", "hyperband", "none"]), default="median",
              show_default=True, help="Pruner that stops trials at an evaluation.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the sampler.")
@click.option("-p", "--plugins", default="", help="Plugins of every trial, as in nexus-run.")
@click.option("-s", "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Trial settings.")
@click.option("--out", type=PATH, help="Folder of the sweep; pass it again to resume.")
@click.option("--json", "as_json", is_flag=True, help="Print the trials as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(
    config: str | None,
    spaces: tuple[str, ...],
    trials: int,
    metric: str,
    mode: str,
    jobs: int,
    sampler: str,
    pruner: str,
    seed: int,
    plugins: str,
    sets: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Search settings with Optuna; the config's own values are the first trial.

    A sweep that was stopped or killed resumes with the same command: finished trials count, and
    unfinished ones continue from their checkpoints.

    \b
    nexus-run sweep my.yaml --over "optim.lr=log(1e-4,1e-2)" --trials 20 --out runs/lr
    nexus-run sweep my.yaml --over "clip.max_norm=choice(0.5,1,2)" --jobs 2 -m val/f1 --mode max
    """
    with reported(debug):
        from nexus_core.errors import ConfigError

        if find_spec("optuna") is None:
            raise ConfigError("a sweep needs Optuna: pip install 'nexus-trainer[sweep]'")
        from nexus_core.cli.folder import automatic
        from nexus_core.cli.launch import Recipe
        from nexus_plugins_contrib.sweep.plots import save_plots
        from nexus_plugins_contrib.sweep.space import read_dimension
        from nexus_plugins_contrib.sweep.study import Search, opened

        space = tuple(map(read_dimension, spaces))
        search = Search(Recipe(config, plugins, sets), space, metric, mode, sampler, pruner, seed)
        own = _own_values(search)
        out = out or next(path for path in automatic("sweep") if not path.exists())
        with opened(out, search, jobs) as study:
            if not study.get_trials(deepcopy=False) and len(own) == len(space):
                study.enqueue_trial(own)
            for line in _search(study, search, out, trials, jobs):
                if not as_json:
                    click.echo(line)
            best = _best_first(study, search, out)
            plots = save_plots(study, out)
            if as_json:
                click.echo(json.dumps(_as_json(study, search, out, best), indent=2))
            else:
                click.echo("\n".join([_report(study, search, out, best), *_named(plots)]))


def _own_values(search: Search) -> dict[str, object]:
    """The config's own values, if they are within the search space; checks its ends too.

    Raises:
        ConfigError: a setting does not exist, or rejects an end of its range.
    """
    from nexus_core.cli.build import build_plugins
    from nexus_core.cli.settings import read_settings

    recipe = search.recipe
    found: dict[str, object] = {}
    for dimension in search.space:
        for value in dimension.edges():
            sets = (*recipe.sets, f"{dimension.key}={value}")
            build_plugins(read_settings(recipe.config, recipe.plugins, sets, os.environ))
    made = build_plugins(
        read_settings(recipe.config, recipe.plugins, recipe.sets, os.environ)
    ).resolved(Path())
    for dimension in search.space:
        head, _, rest = dimension.key.rpartition(".")
        block = made["plugins"].get(head, {}) if head else made
        value = dimension.admits(block.get(rest))
        if value is not None:
            found[dimension.key] = value
    return found


def _search(
    study: optuna.Study, search: Search, out: Path, trials: int, jobs: int
) -> Iterator[str]:
    """Train trials up to the requested number; yields a line for each."""
    from dataclasses import replace

    from nexus_core.cli.launch import Crew, checked
    from nexus_core.cli.records import Run
    from nexus_core.errors import ConfigError
    from nexus_plugins_contrib.sweep.study import close_value, folder_of, left_over
    from nexus_plugins_contrib.sweep.trial import work

    distributions = {dimension.key: dimension.distribution() for dimension in search.space}
    begun = list(left_over(study))
    running = {}
    modules = [*checked(search.recipe), "nexus_plugins_contrib.sweep.trial"]
    with Crew(modules, jobs) as crew:
        while True:
            there = len(study.get_trials(deepcopy=False)) - _waiting(study)
            while not crew.is_full and (begun or there < trials):
                asked = begun.pop(0) if begun else study.ask(distributions)
                there = len(study.get_trials(deepcopy=False)) - _waiting(study)
                path = folder_of(out, asked)
                sets = tuple(f"{key}={value}" for key, value in asked.params.items())
                recipe = replace(search.recipe, sets=(*search.recipe.sets, *sets))
                number = asked._trial_id
                crew.start(path, work, recipe, path, out, number, search.metric)
                running[path] = study.get_trials(deepcopy=False)[asked.number]
            if not len(crew):
                return
            path, code = crew.wait()
            trial = running.pop(path)
            if code == ConfigError.exit_code or code > 128 or code < 0:
                crew.check(path, code)
            said = "failed, see its log"
            if code == 0:
                said = close_value(study, trial, Run(path).summary, search)
            else:
                from optuna.trial import TrialState

                study.tell(trial.number, state=TrialState.FAIL)
            values = ", ".join(f"{key}={value}" for key, value in trial.params.items())
            yield f"trial {trial.number} of {trials}: {values}: {said}"


def _waiting(study: optuna.Study) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _best_first(study: optuna.Study, search: Search, out: Path) -> list[FrozenTrial]:
    """The finished trials, best first.

    Raises:
        ConfigError: none did.
    """
    from optuna.trial import TrialState

    from nexus_core.errors import ConfigError

    every = study.get_trials(deepcopy=False)
    complete = [trial for trial in every if trial.state is TrialState.COMPLETE]
    if not complete:
        raise ConfigError(f"none of {len(every)} trials finished; their logs are in '{out}'")
    sign = 1 if search.mode == "min" else -1
    return sorted(complete, key=lambda trial: sign * (trial.value or 0.0))


def _as_json(
    study: optuna.Study, search: Search, out: Path, best: Sequence[FrozenTrial]
) -> dict[str, object]:
    from nexus_plugins_contrib.sweep.study import folder_of

    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "settings": trial.params,
            "run": str(folder_of(out, trial)),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    return {"metric": search.metric, "mode": search.mode, "best": best[0].number, "trials": trials}


def _named(plots: Iterable[Path]) -> list[str]:
    return [f"picture: {path}" for path in plots]


def _report(study: optuna.Study, search: Search, out: Path, best: Sequence[FrozenTrial]) -> str:
    """The best trials, and how to train the best one again."""
    from nexus_core.cli.tables import aligned
    from nexus_plugins_contrib.sweep.study import folder_of

    every = study.get_trials(deepcopy=False)
    keys = [dimension.key for dimension in search.space]
    rows = [["trial", search.metric, *keys]]
    for trial in best[:_SHOWN]:
        values = [f"{trial.params[key]}" for key in keys]
        rows.append([str(trial.number), f"{trial.value:.4f}", *values])
    counts = {trial.state.name.lower(): 0 for trial in every}
    for trial in every:
        counts[trial.state.name.lower()] += 1
    sets = shlex.join([f"--set={key}={best[0].params[key]}" for key in keys])
    return "\n".join([
        aligned(rows, (0, 1)),
        f"{len(every)} trials: " + ", ".join(f"{n} {state}" for state, n in counts.items()),
        f"the best: {folder_of(out, best[0])}, {sets}",
        f"all trials: nexus-run runs {shlex.quote(str(out))} --sort {search.metric}",
    ])  # fmt: skip
