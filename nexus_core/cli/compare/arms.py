"""What is compared: the runs of a base and of its variants, there already or to be made."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: as the tables show it.
        recipe: how its runs are made; None: they are there already.
        runs: that are there already.
        origins: the checkpoints that its runs branch off, by seed; None: they are no branches.
    """

    name: str
    recipe: Recipe | None = None
    runs: tuple[Run, ...] = ()
    origins: Mapping[int, Saved] | None = None

    def recipe_for(self, seed: int) -> Recipe:
        """How its run of a seed is made: a branch starts from the config of its checkpoint."""
        assert self.recipe is not None
        if self.origins is None:
            return self.recipe
        return replace(self.recipe, config=str(self.origins[seed].config))

    @property
    def folder(self) -> str:
        """A name for a folder of its runs."""
        return _UNSAFE.sub("_", self.name).strip("._")[:80] or "variant"


def read_arms(
    base: str, variants: Iterable[str], plugins: str = "", sets: tuple[str, ...] = ()
) -> list[Arm]:
    """Read what is to be compared; the base comes first.

    A word is the folder of a run or of several, a config file, a preset, or changes of the base:
    `"lr=1e-3 no:PLUGIN"`, perhaps behind a name: `"faster: lr=1e-3"`. A base with a checkpoint,
    `runs/mine@5000`, is branched there by each variant.

    Args:
        base: no changes.
        variants: at least one.
        plugins: as `--plugins`, for the runs that are made.
        sets: as `--set`, likewise.

    Raises:
        ConfigError: a word is nothing of all this, or two stand for the same.
    """
    common = Recipe(None, plugins, sets)
    first = _there(base) or _branched(base, common) or _configured(base, common)
    if first is None:
        raise ConfigError(
            f"'{base}' is no folder with runs, no config file and no preset "
            f"({', '.join(sorted(presets()))}); the first word says what the others change"
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
            raise ConfigError(
                f"'{arm.name}' is there twice; give one of them a name: 'NAME: {arm.name}'"
            )
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
    if common == Recipe():  # the runs themselves are what a branch without a change would be
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
    """How further runs of the base are made: by the config of one of those that are there."""
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
                f"'{each}' is no folder with runs, no config file, no preset and no change; a "
                "change is KEY=VALUE, +PLUGIN, ./FILE.py or no:PLUGIN"
            )
    plugins = ",".join(filter(None, [source.plugins, *(n.removeprefix("+") for n in names)]))
    recipe = replace(source, plugins=plugins, sets=(*source.sets, *sets))
    return Arm(label or rest, recipe, origins=base.origins)


def _labelled(word: str) -> tuple[str, str]:
    match = _LABEL.fullmatch(word.strip())
    return (match["name"].strip(), match["rest"].strip()) if match else ("", word.strip())


def seeds_of(arms: Sequence[Arm], first: int, pairs: int) -> list[int]:
    """The seeds to train: those of the base's runs that are there, then new ones.

    Branches have the seeds of the runs that they branch off, and there are no more of them.
    """
    if arms[0].origins is not None:
        return sorted(arms[0].origins)[:pairs]
    there = sorted({run.seed for run in arms[0].runs})[:pairs]
    new = (seed for seed in range(first, first + 2 * pairs + len(there)) if seed not in there)
    return [*there, *(next(new) for _ in range(pairs - len(there)))]
