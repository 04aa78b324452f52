"""The arms of a comparison: runs of a baseline and its variants, existing or to be trained."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_core.cli.config_file import is_config_file
from nexus_core.cli.launch import Recipe
from nexus_core.cli.recorded import Saved, saved_at
from nexus_core.cli.records import CONFIG, Run, find_runs
from nexus_core.cli.settings import presets
from nexus_core.errors import ConfigError

__all__ = ["Arm", "read_arms", "seeds_of"]

_LABEL = re.compile(r"(?P<name>[^=:/]+):\s+(?P<rest>\S.*)", re.DOTALL)
_UNSAFE = re.compile(r"[^\w.=+-]+")
_LONGEST = 80


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: as shown in the tables.
        recipe: how to make its runs; None: they already exist.
        runs: those that already exist.
        origins: the checkpoints its runs branch off, by seed; None: they are not branches.
    """

    name: str
    recipe: Recipe | None = None
    runs: tuple[Run, ...] = ()
    origins: Mapping[int, Saved] | None = None

    def recipe_for(self, seed: int) -> Recipe:
        """How to make its run of a seed; a branch starts from the config of its checkpoint."""
        assert self.recipe is not None
        if self.origins is None:
            return self.recipe
        return replace(self.recipe, config=str(self.origins[seed].config))

    @property
    def folder(self) -> str:
        """A folder name for its runs; long names are cut, with a hash to keep them distinct."""
        name = _UNSAFE.sub("_", self.name).strip("._") or "variant"
        if len(name) <= _LONGEST:
            return name
        return f"{name[: _LONGEST - 9]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def read_arms(
    base: str, variants: Iterable[str], plugins: str = "", sets: tuple[str, ...] = ()
) -> list[Arm]:
    """Parse what to compare; the base comes first.

    A word is a run's folder, a folder of runs, a config file, a preset, or changes to the base:
    `"lr=1e-3 no:PLUGIN"`, optionally named: `"faster: lr=1e-3"`. If the base is a checkpoint,
    `runs/mine@5000`, each variant branches off it.

    Args:
        base: no changes.
        variants: at least one.
        plugins: as `--plugins`, for the runs to be trained.
        sets: as `--set`, likewise.

    Raises:
        ConfigError: a word matches none of these, or two mean the same.
    """
    common = Recipe(None, plugins, sets)
    first = _there(base) or _branched(base, common) or _configured(base, common)
    if first is None:
        raise ConfigError(
            f"'{base}' is not a run folder, config file or preset "
            f"({', '.join(sorted(presets()))}); the first argument is the base"
        )
    source = _recipe_of(first, common)
    arms = [first]
    for word in variants:
        arms.append(_there(word) or _configured(word, common) or _changed(word, source, first))
    for arm in arms[1:]:
        if first.origins is not None and arm.recipe is not None and arm.origins is None:
            raise ConfigError(
                f"'{arm.name}' does not branch off '{base}'; a variant of RUNS@STEP is a change, "
                "such as 'lr=1e-3', or a folder with runs"
            )
    for number, arm in enumerate(arms):
        if arm.folder in {other.folder for other in arms[:number]}:
            raise ConfigError(f"'{arm.name}' appears twice; name one of them: 'NAME: {arm.name}'")
    if any(arm.recipe for arm in arms[1:]) and first.recipe is None and first.origins is None:
        arms[0] = replace(first, recipe=source)
    return arms


def _there(word: str) -> Arm | None:
    path = Path(word)
    if not path.is_dir():
        return None
    runs = find_runs(path)
    if not runs:
        raise ConfigError(f"there are no runs in or below the folder '{word}'")
    return Arm(word.rstrip("/"), runs=tuple(Run(run.path, str(run.path)) for run in runs))


def _branched(word: str, common: Recipe) -> Arm | None:
    folder, at, wanted = word.rpartition("@")
    runs = _there(folder) if at and folder else None
    if runs is None:
        return None
    origins = {run.seed: saved_at(f"{run.path}@{wanted}") for run in runs.runs}
    if len(origins) < len(runs.runs):
        raise ConfigError(
            f"several runs in '{folder}' have the same seed; name the folder of the one to branch"
        )
    if common == Recipe():  # a branch without a change would only repeat the runs
        return replace(runs, origins=origins)
    return Arm(word, common, origins=origins)


def _configured(word: str, common: Recipe) -> Arm | None:
    label, rest = _labelled(word)
    if "=" in rest or not (is_config_file(rest) or rest in presets()):
        return None
    if is_config_file(rest) and not Path(rest).is_file():
        raise ConfigError(f"there is no config file '{rest}'")
    return Arm(label or rest, replace(common, config=rest))


def _recipe_of(base: Arm, common: Recipe) -> Recipe:
    """How to make further runs of the base: with the config of one that exists."""
    if base.recipe is not None:
        return base.recipe
    return replace(common, config=str(base.runs[0].path / CONFIG))


def _changed(word: str, source: Recipe, base: Arm) -> Arm:
    label, rest = _labelled(word)
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ConfigError(f"'{word}' cannot be read: {error}") from None
    if not words:
        raise ConfigError(f"'{word}' changes nothing; expected KEY=VALUE, no:PLUGIN or +PLUGIN")
    sets, names = list[str](), list[str]()
    for each in words:
        if "=" in each:
            sets.append(each)
        elif each.startswith(("+", "no:", "./", "../", "/")):
            names.append(each)
        elif sets:  # `until=5 steps`
            sets[-1] += f" {each}"
        else:
            raise ConfigError(
                f"'{each}' is not a folder with runs, a config file, a preset or a change; a "
                "change is KEY=VALUE, +PLUGIN, ./FILE.py or no:PLUGIN"
            )
    plugins = ",".join(filter(None, [source.plugins, *(n.removeprefix("+") for n in names)]))
    recipe = replace(source, plugins=plugins, sets=(*source.sets, *sets))
    return Arm(label or rest, recipe, origins=base.origins)


def _labelled(word: str) -> tuple[str, str]:
    match = _LABEL.fullmatch(word.strip())
    return (match["name"].strip(), match["rest"].strip()) if match else ("", word.strip())


def seeds_of(arms: Sequence[Arm], first: int, pairs: int) -> list[int]:
    """The seeds to train: those of the existing base runs, then new ones.

    Branches reuse the seeds of the runs they branch off; no new seeds are added.
    """
    if arms[0].origins is not None:
        return sorted(arms[0].origins)[:pairs]
    there = sorted({run.seed for run in arms[0].runs})[:pairs]
    new = (seed for seed in range(first, first + 2 * pairs + len(there)) if seed not in there)
    return [*there, *(next(new) for _ in range(pairs - len(there)))]
