"""Find and read a checkpoint on all ranks, with the same outcome on each."""

from __future__ import annotations

import warnings
from pathlib import Path

from nexus_core.errors import CheckpointError, hint_out
from nexus_core.processes import Ranks, gather
from nexus_plugins._shared.checkpoints.folder import Content
from nexus_plugins._shared.checkpoints.folder import read as read_folder
from nexus_plugins._shared.checkpoints.store import (
    Store,
    checkpoint_at,
    newest_first,
    step_of,
    stores_at,
)

__all__ = ["read", "read_newest", "read_path"]


def read(path: Path, ranks: Ranks) -> Content:
    """Read a checkpoint on every rank; if one rank fails, all fail.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    content, fault = None, ""
    try:
        content = read_folder(path, ranks)
    except CheckpointError as error:
        fault = str(error)
    faults = [fault for fault in gather(ranks, fault) if fault]
    if content is None or faults:
        raise CheckpointError(faults[0])
    return content


def read_newest(stores: list[Store], ranks: Ranks) -> Content | None:
    """The newest valid checkpoint; skipped ones are reported. None if nothing is saved.

    Raises:
        CheckpointError: checkpoints exist, but none is valid.
    """
    faults = []
    for path in newest_first(stores):
        try:
            content = read(path, ranks)
            if content.step != step_of(path.name):
                raise CheckpointError(f"{path} is of step {content.step} according to its manifest")
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"skipped a damaged checkpoint: {fault}", RuntimeWarning, stacklevel=2)
        return content
    if not faults:
        return None
    raise CheckpointError(
        f"no checkpoint in {stores[-1].root} is intact: {'; '.join(faults)}. Restore one "
        "from a backup, or start over in another folder: ",
        hint_out(),
    )


def read_path(path: Path, ranks: Ranks) -> Content:
    """The checkpoint at a path, or the newest valid one of the run at a path."""
    if (found := checkpoint_at(path)) is not None:
        return read(found, ranks)
    if (found_newest := read_newest(stores_at(path), ranks)) is not None:
        return found_newest
    raise CheckpointError(
        f"no checkpoint at '{path}'; give the folder of one "
        "(runs/x/checkpoints/step-00000100), of a run (runs/x), or auto, best or final"
    )
