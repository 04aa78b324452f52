"""Find the config of a run to resume when the command line names none."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus_core.cli import yaml12
from nexus_core.cli.local import without_label
from nexus_core.errors import ConfigError
from nexus_core.places import absolute, only_named

__all__ = ["config_base", "newest_run", "only_code_of_the_command", "resumed_config"]

RUNS = Path("runs")
CONFIG = "config.yaml"
FOLDER = "checkpoints"


def newest_run() -> str:
    """The run below `runs/` that saved a checkpoint last.

    Raises:
        ConfigError: no run has saved one.
    """
    saved = [p for p in RUNS.glob(f"*/{FOLDER}*/step-*") if (p.parents[1] / CONFIG).is_file()]
    if not saved:
        raise ConfigError(
            f"no run below {RUNS}/ has a checkpoint; name a run: nexus-run resume RUN"
        )
    return str(max(saved, key=lambda path: path.stat().st_mtime_ns).parents[1])


def resumed_config(resume: str | None) -> tuple[str | None, dict[str, Any]]:
    """The config of a run, and the keys to override in it.

    Args:
        resume: folder of a run or checkpoint; anything else is not a path and has no config.

    Returns:
        The config's path, None if there is no such folder; and the run folder as `out`, since a run
        may have been moved.

    Raises:
        ConfigError: the folder exists but has no config.
    """
    if resume is None or not Path(resume).is_dir():
        return None, {}
    path = Path(resume).resolve()
    run = path.parent.parent if _holds_checkpoints(path.parent) else None
    run = path.parent if _holds_checkpoints(path) else run
    if any(path.glob(f"{FOLDER}*")):
        run = path
    config = next((p / CONFIG for p in (path, run) if p and (p / CONFIG).is_file()), None)
    if config is None:
        raise ConfigError(
            f"'{resume}' has no {CONFIG}; name the config of its run: nexus-run CONFIG "
            f"--resume {resume}"
        )
    if run is not None and Path.cwd() in run.parents:
        run = run.relative_to(Path.cwd())
    return str(config), {"out": run}


def config_base(config: Path) -> Path:
    """The folder that a config's relative paths are relative to: its own, or its run's."""
    folder = config.absolute().parent
    return folder.parent.parent if _holds_checkpoints(folder.parent) else folder


@contextmanager
def only_code_of_the_command(
    resume: str, plugins: str, sets: Iterable[str], environment: Mapping[str, str]
) -> Iterator[None]:
    """Refuse to load code named in a run's config unless the command names it too.

    Args:
        resume: what to resume; the user has not named the config found with it.
        plugins: as in `--plugins`.
        sets: as in each `--set`.
        environment: environment variables.
    """
    values = [yaml12.parse_value(text.partition("=")[2]).value for text in sets]
    values += [text for name, text in environment.items() if name.startswith("NEXUS_")]
    named = {text.strip() for text in (*plugins.split(","), *_texts(values))}
    fix = f"the config of '{resume}' loads it; if it is your own code, add --trust: " + shlex.join(
        ["nexus-run", "resume", resume, "--trust"]
    )
    with only_named({absolute(without_label(text)[0]) for text in named if text}, fix):
        yield


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _holds_checkpoints(folder: Path) -> bool:
    """Whether its name is that of a checkpoint folder: `checkpoints`, `checkpoints@late`."""
    return folder.name.partition("@")[0] == FOLDER
