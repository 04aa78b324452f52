"""Copies of a run's local code in its folder, so that its config repeats the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_core.places import FOLDER, used
from nexus_core.sources import Source

__all__ = ["check_free", "code_of", "write_copies"]


def code_of(engine: Engine) -> tuple[Source, ...]:
    """The local files that define the run's plugins, each once."""
    found = {source.file: source for plugin in engine.plugins.values() for source in used(plugin)}
    return tuple(found.values())


def check_free(code: Sequence[Source], out: Path) -> None:
    """Check that no copy would overwrite a user's file.

    Raises:
        ConfigError: one would.
    """
    for source in code:
        path = _copy(source, out)
        if path.exists() and path.read_bytes() != source.content:
            raise ConfigError(
                f"'{path}' already exists and differs from the copy of '{source.path}' "
                "that the run would write there; choose another folder with --out"
            )


def write_copies(code: Sequence[Source], out: Path) -> list[Path]:
    """Write the copies, each atomically.

    Returns:
        What was created, outermost folder first; existing copies are not included.
    """
    made: list[Path] = []
    for source in code:
        path = _copy(source, out)
        for folder in reversed(path.relative_to(out).parents[:-1]):
            if not (out / folder).is_dir():
                (out / folder).mkdir()
                made.append(out / folder)
        if not path.exists():
            made.append(path)
        elif path.read_bytes() == source.content:
            continue
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        draft.write_bytes(source.content)
        draft.replace(path)
    return made


def _copy(source: Source, out: Path) -> Path:
    return out / FOLDER / source.file
