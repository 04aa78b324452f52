"""The config of a run that is to be resumed, where the command line names none."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus_core.cli import yaml12
from nexus_core.cli.local import without_label
from nexus_core.errors import ConfigError
from nexus_core.places import absolute, only_named, shown

__all__ = ["config_base", "only_code_of_the_command", "resumed_config"]

CONFIG = "config.yaml"
FOLDER = "checkpoints"


def resumed_config(resume: str | None) -> tuple[str | None, dict[str, Any]]:
    """The config of a run, and what has to be replaced in it.

    Args:
        resume: the folder of a run or of a checkpoint; anything else is no path, and has no config.

    Returns:
        The config's path, None where there is no such folder; and the folder of the run as `out`,
        since a run may have been moved.

    Raises:
        ConfigError: the folder is there, and no config in it.
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
    return str(config), {"out": run}


def config_base(config: Path) -> Path:
    """What relative places in a config file are relative to: its folder, or that of its run."""
    folder = config.absolute().parent
    return folder.parent.parent if _holds_checkpoints(folder.parent) else folder


@contextmanager
def only_code_of_the_command(
    config: str, resume: str, plugins: str, sets: Iterable[str], environment: Mapping[str, str]
) -> Iterator[None]:
    """Load no code that the config of a run names, but for what the command names as well.

    Args:
        config: that was found with the checkpoint, and not named.
        resume: what is resumed.
        plugins: as behind `--plugins`.
        sets: as behind each `--set`.
        environment: variables.
    """
    values = [yaml12.parse_value(text.partition("=")[2]).value for text in sets]
    values += [text for name, text in environment.items() if name.startswith("NEXUS_")]
    named = {text.strip() for text in (*plugins.split(","), *_texts(values))}
    command = shlex.join(["nexus-run", shown(config), "--resume", resume])
    fix = (
        f"the config of '{resume}' asks for it, and code comes from what you name yourself; name "
        f"the config: {command}, or the code, behind --plugins or --set"
    )
    with only_named({absolute(without_label(text)[0]) for text in named if text}, fix):
        yield


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _holds_checkpoints(folder: Path) -> bool:
    """Whether it goes by the name of such a folder: `checkpoints`, `checkpoints@late`."""
    return folder.name.partition("@")[0] == FOLDER
