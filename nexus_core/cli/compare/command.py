"""`nexus-run compare`: paired comparison of variants with a base, with anytime-valid intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import click

from nexus_core.cli.compare.arms import Arm, read_arms, seeds_of
from nexus_core.cli.compare.page import page
from nexus_core.cli.compare.pairs import Paired, pair_up
from nexus_core.cli.compare.pictures import save_png
from nexus_core.cli.compare.result import as_json, as_text, chosen_metrics, rows_of
from nexus_core.cli.errors import reported
from nexus_core.cli.folder import automatic
from nexus_core.cli.launch import Crew, branch_in_folder, checked, train_in_folder
from nexus_core.cli.options import PATH
from nexus_core.cli.records import Run
from nexus_core.errors import ConfigError

__all__ = ["main"]

_PLAN = "comparison.json"


@click.command(name="compare", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base")
@click.argument("variants", nargs=-1, required=True, metavar="VARIANT...")
@click.option("--pairs", default=5, show_default=True, type=click.IntRange(min=1),
              help="Number of paired runs.")  # fmt: skip
@click.option("-m", "--metric", "metrics", multiple=True, metavar="NAME",
              help="Metric to compare by; may be repeated. Default: val/loss, or what there "
              "is.")  # fmt: skip
@click.option("-p", "--plugins", default="", help="As in nexus-run, for all runs that are trained.")
@click.option("-s", "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Likewise.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first new pair.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1),
              help="Runs to train in parallel; they share the cores.")  # fmt: skip
@click.option("--confidence", default=0.95, show_default=True,
              type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Confidence level of each interval.")  # fmt: skip
@click.option("--out", type=PATH, help="Folder for new runs and the HTML page.")
@click.option("--json", "as_json_", is_flag=True, help="Print the result as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(
    base: str,
    variants: tuple[str, ...],
    pairs: int,
    metrics: tuple[str, ...],
    plugins: str,
    sets: tuple[str, ...],
    seed: int,
    jobs: int,
    confidence: float,
    out: Path | None,
    as_json_: bool,
    debug: bool,
) -> None:
    """Compare variants with a base, in pairs of runs with the same seed, data and noise.

    BASE is a config file, a preset, or a folder with runs; a VARIANT is one of these, or changes to
    BASE: KEY=VALUE, +PLUGIN, no:PLUGIN, optionally named. With RUNS@STEP as BASE, each variant
    branches off its runs there. Missing runs are trained; the same command resumes, and a larger
    --pairs adds runs.

    \b
    nexus-run compare my.yaml "lr=1e-3" "both: lr=1e-3 until=9 epochs"
    nexus-run compare my.yaml other.yaml --pairs 10 --jobs 2 --out runs/which
    nexus-run compare runs/a runs/b --metric val/loss
    nexus-run compare runs/a@5000 "lr=1e-4"
    """
    with reported(debug):
        arms = read_arms(base, variants, plugins, sets)
        if any(text.partition("=")[0].strip() == "seed" for arm in arms for text in _sets(arm)):
            raise ConfigError("each pair has its own seed; set the first one with --seed")
        made = [arm for arm in arms if arm.recipe is not None]
        out = out or next(path for path in automatic("compare") if not path.exists())
        if made:
            _check_plan(out, arms)
            for done in _train(arms, seeds_of(arms, seed, pairs), out, jobs):
                if not as_json_:
                    click.echo(done)
        groups = _groups(arms, out)
        shown = chosen_metrics(groups, metrics)
        rows = rows_of(groups, shown, confidence)
        result = as_json(groups, rows, confidence)
        click.echo(json.dumps(result, indent=2) if as_json_ else as_text(groups, rows, confidence))
        out.mkdir(parents=True, exist_ok=True)
        title = f"{', '.join(arm.name for arm in arms[1:])} against {arms[0].name}"
        files = {
            "compare.html": page(title, groups, rows, confidence),
            "compare.json": json.dumps(result, indent=2) + "\n",
        }
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
        picture = save_png(groups, shown[0], confidence, out / "compare.png") if shown else None
        if not as_json_:
            click.echo(f"page: {out / 'compare.html'}")
            click.echo(f"picture: {picture}" if picture else "")


def _sets(arm: Arm) -> Sequence[str]:
    return arm.recipe.sets if arm.recipe is not None else ()


def _groups(arms: Sequence[Arm], out: Path) -> list[Paired]:
    """The pairs of each variant, from new and existing runs."""
    sides = [[*arm.runs, *_made(arm, out)] for arm in arms]
    groups = [
        pair_up(arm.name, sides[0], runs) for arm, runs in zip(arms[1:], sides[1:], strict=True)
    ]
    for group in groups:
        if not group.pairs:
            seeds = sorted({run.seed for run in sides[0]})
            raise ConfigError(
                f"'{group.name}' has no run of a seed and branch point that the base has (the base "
                f"has the seeds {', '.join(map(str, seeds)) or 'none'}, the variant "
                f"{', '.join(str(run.seed) for run in group.alone) or 'none'})"
            )
    return groups


def _made(arm: Arm, out: Path) -> list[Run]:
    """The finished runs of an arm that any call has trained in this folder."""
    if arm.recipe is None:
        return []
    found = [path.parent for path in (out / arm.folder).glob("seed-*/config.yaml")]
    return [Run(path, str(path)) for path in found if _is_finished(path)]


def _train(arms: Sequence[Arm], seeds: Sequence[int], out: Path, jobs: int) -> Iterator[str]:
    """Train the missing runs, pair by pair; yields a line for each finished run."""
    todo = [
        (arm, seed, out / arm.folder / f"seed-{seed}")
        for seed in seeds
        for arm in arms
        if arm.recipe is not None and seed not in {run.seed for run in arm.runs}
    ]
    todo = [(arm, seed, path) for arm, seed, path in todo if not _is_finished(path)]
    total, names = len(todo), {path: f"{arm.name}, seed {seed}" for arm, seed, path in todo}
    needed = {recipe for arm, seed, _ in todo for recipe in [arm.recipe_for(seed)]}
    modules = {name: None for recipe in needed for name in checked(recipe)}
    with Crew(list(modules), jobs) as crew:
        while todo or len(crew):
            while todo and not crew.is_full:
                arm, seed, path = todo.pop(0)
                recipe = arm.recipe_for(seed)
                if arm.origins is None:
                    crew.start(path, train_in_folder, recipe, path, {"seed": seed})
                else:
                    crew.start(path, branch_in_folder, recipe, path, arm.origins[seed])
            path, code = crew.wait()
            crew.check(path, code)
            left = total - len(todo) - len(crew)
            yield f"{left} of {total} trained: {names[path]}"


def _is_finished(path: Path) -> bool:
    return (path / "config.yaml").is_file() and Run(path).status == "finished"


def _check_plan(out: Path, arms: Sequence[Arm]) -> None:
    """Record what a folder compares; refuse a folder where an arm's name meant something else.

    Raises:
        ConfigError: it did.
    """
    place = out / _PLAN
    plan = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    for arm in arms:
        if arm.recipe is None:
            continue
        now = {**asdict(arm.recipe), "sets": list(arm.recipe.sets), "sha256": _hash(arm)}
        if arm.origins is not None:
            now["origins"] = {str(seed): str(saved.path) for seed, saved in arm.origins.items()}
        if plan.setdefault(arm.folder, now) != now:
            raise ConfigError(
                f"'{out}' holds runs of another '{arm.name}' (its config or settings have changed "
                "since); choose another folder with --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")


def _hash(arm: Arm) -> str | None:
    path = Path(arm.recipe.config or "") if arm.recipe is not None else Path()
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else None
