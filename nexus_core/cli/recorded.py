"""A run on disk: its config, its checkpoints, and the engine rebuilt from them."""

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
    "UntrustedError",
    "checkpoints",
    "config_of",
    "only_trusted",
    "saved_at",
    "settings_in",
    "without_watchers",
]

_STEP = re.compile(r"step-(\d{8,20})")
_SHOWN = 8  # steps in an error


class UntrustedError(ConfigError):
    """A run's config names local code that the user has not trusted."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run.

    Args:
        run: the run folder.
        path: the checkpoint, resolved from a name such as `best`.
    """

    run: Path
    path: Path

    @property
    def config(self) -> Path:
        """The run's config when the checkpoint was saved."""
        own = self.path / CONFIG
        return own if own.is_file() else config_of(self.run)


def config_of(run: Path) -> Path:
    """The config in a run folder.

    Raises:
        ConfigError: the folder does not exist, or has no config.
    """
    if not run.is_dir():
        raise ConfigError(f"there is no run in '{run}': no such folder")
    if not (run / CONFIG).is_file():
        runs = "".join(f"; a run in it: {p.parent}" for p in sorted(run.glob(f"*/{CONFIG}"))[-1:])
        raise ConfigError(f"'{run}' is not a run folder: it has no {CONFIG}{runs}")
    return run / CONFIG


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, in ascending order."""
    found = {
        int(match[1]): path
        for path in sorted(run.glob(f"{FOLDER}*/step-*"), reverse=True)  # unlabelled ones win
        if (match := _STEP.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return dict(sorted(found.items()))


def saved_at(text: str) -> Saved:
    """Resolve `RUN@5000`, `RUN@best`, `RUN` (the newest) or a checkpoint path.

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
        raise ConfigError(f"'{folder}' has no checkpoint of step {step}; it has: {shown or 'none'}")
    return Saved(folder, there[step])


def settings_in(config: Path) -> Mapping[str, Any]:
    """The resolved settings in a config that a run wrote."""
    content: Mapping[str, Any] = read_config_file(config).value
    return content


@contextmanager
def only_trusted(run: Path, *, trust: bool) -> Iterator[None]:
    """Refuse to load local code that a run's config names, unless the user trusts it.

    Raises:
        UntrustedError: it was to be loaded.
    """
    fix = f"the config of '{run}' loads it; if it is your own code, add --trust"
    if trust:
        yield
        return
    with only_named((), fix):
        try:
            yield
        except ConfigError as error:
            if fix not in str(error):
                raise
            raise UntrustedError(*error.args) from error


def without_watchers(snapshot: Snapshot, watching: Mapping[str, bool]) -> Snapshot:
    """The snapshot without the state of observers, such as the run's id in a service.

    Args:
        snapshot: the snapshot read.
        watching: whether each plugin of this run only observes, by its name.
    """
    kept = {n: s for n, s in snapshot["plugins"].items() if not watching.get(n, False)}
    extras: dict[str, StateDict] = {
        n: s for n, s in snapshot.get("extras", {}).items() if not watching.get(n, False)
    }
    return {**snapshot, "plugins": kept, "extras": extras}
