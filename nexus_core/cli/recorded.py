"""A run as it lies in its folder: its config, its checkpoints, and the engine built again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_core.cli.config_file import read_config_file
from nexus_core.cli.resumed import CONFIG, FOLDER
from nexus_core.errors import ConfigError
from nexus_core.places import only_named
from nexus_core.plugin import StateDict
from nexus_core.snapshot import Snapshot

__all__ = [
    "Saved",
    "checkpoints",
    "config_of",
    "only_trusted",
    "saved_at",
    "settings_in",
    "without_watchers",
]

_STEP = re.compile(r"step-(\d{8,20})")
_SHOWN = 8  # steps in an error


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run.

    Args:
        run: the run's folder.
        path: of the checkpoint; a name such as `best` may lead to it.
    """

    run: Path
    path: Path

    @property
    def config(self) -> Path:
        """The config that the run had when it was saved."""
        own = self.path / CONFIG
        return own if own.is_file() else config_of(self.run)


def config_of(run: Path) -> Path:
    """The config in a run's folder.

    Raises:
        ConfigError: there is no such folder, or no config in it.
    """
    if not run.is_dir():
        raise ConfigError(f"there is no run in '{run}': no such folder")
    if not (run / CONFIG).is_file():
        raise ConfigError(f"'{run}' is not the folder of a run: it has no {CONFIG}")
    return run / CONFIG


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, first step first."""
    found = {
        int(match[1]): path
        for path in sorted(run.glob(f"{FOLDER}*/step-*"), reverse=True)  # those without a label win
        if (match := _STEP.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return dict(sorted(found.items()))


def saved_at(text: str) -> Saved:
    """What `RUN@5000`, `RUN@best`, `RUN` (its newest) or the path of a checkpoint means.

    Raises:
        ConfigError: there is no such run, or it has no such checkpoint.
    """
    path = Path(text)
    run, at, wanted = text.rpartition("@")
    if path.is_dir() and path.parent.name.partition("@")[0] == FOLDER:
        return Saved(path.absolute().parent.parent, path.absolute())
    folder, wanted = (Path(run), wanted) if at and not path.is_dir() else (path, "")
    config_of(folder)
    folder, there = folder.absolute(), checkpoints(folder.absolute())
    if wanted and not wanted.isdigit():
        named = folder / FOLDER / wanted
        if wanted != Path(wanted).name or not named.exists():
            raise ConfigError(
                f"'{folder}' has no checkpoint '{wanted}'; expected RUN@STEP, such as "
                f"{run}@{max(there, default=1000)}, RUN@best or RUN@final"
            )
        return Saved(folder, named)
    step = int(wanted) if wanted else max(there, default=0)
    if step not in there:
        steps = [f"{step:,}".replace(",", "") for step in there]
        shown = ", ".join(["...", *steps[-_SHOWN:]] if len(steps) > _SHOWN else steps)
        raise ConfigError(
            f"'{folder}' has no checkpoint of step {step}; it has those of: {shown or 'no step'}"
        )
    return Saved(folder, there[step])


def settings_in(config: Path) -> Mapping[str, Any]:
    """The resolved settings in a config that a run has written."""
    content: Mapping[str, Any] = read_config_file(config).value
    return content


@contextmanager
def only_trusted(run: Path, *, trust: bool) -> Iterator[None]:
    """Load no local code that the config of a run names, unless its user says so."""
    fix = f"the config of '{run}' asks for it; where that is your own, add --trust"
    if trust:
        yield
        return
    with only_named((), fix):
        yield


def without_watchers(snapshot: Snapshot, watching: Mapping[str, bool]) -> Snapshot:
    """The snapshot without what plugins that only watch keep of a run, such as its id in a service.

    Args:
        snapshot: as read.
        watching: whether each plugin of this run only watches, by its name.
    """
    kept = {n: s for n, s in snapshot["plugins"].items() if not watching.get(n, False)}
    extras: dict[str, StateDict] = {
        n: s for n, s in snapshot.get("extras", {}).items() if not watching.get(n, False)
    }
    return {**snapshot, "plugins": kept, "extras": extras}
