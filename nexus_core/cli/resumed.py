"""The config of a run that is to be resumed, where the command line names none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nexus_core.errors import ConfigError

__all__ = ["resumed_config"]

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
    run = path.parent.parent if path.parent.name == FOLDER else None
    run = path.parent if path.name == FOLDER else run
    if (path / FOLDER).is_dir():
        run = path
    config = next((p / CONFIG for p in (path, run) if p and (p / CONFIG).is_file()), None)
    if config is None:
        raise ConfigError(
            f"'{resume}' has no {CONFIG}; name the config of its run: nexus-run CONFIG "
            f"--resume {resume}"
        )
    return str(config), {"out": run}
