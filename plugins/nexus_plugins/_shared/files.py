"""Files that somebody else may have put there: read as they are, through no link, and bounded."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

import yaml

from nexus_core.errors import CheckpointError

__all__ = ["check_plain_yaml", "opened", "read_small"]

_DEPTH = 64


def opened(path: Path) -> FileIO:
    """Open a regular file of the folder itself: no link, no pipe, no device.

    Raises:
        OSError: it cannot be opened, or is a link.
        CheckpointError: it is another kind of file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("it is not a regular file")
    return FileIO(descriptor, "r")


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a regular file that is no link, and no larger than a limit.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is no such file.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{size} bytes are more than the {limit} allowed")
        return file.read(limit)


def check_plain_yaml(raw: bytes) -> None:
    """See that a document of YAML is as large as it looks: no aliases, which a few lines of make
    gigabytes, and not nested without end.

    Raises:
        CheckpointError: it is not.
    """
    depth = 0
    try:
        for event in yaml.parse(raw, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise CheckpointError("it has aliases (*name), which a config of a run never has")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH:
                raise CheckpointError(f"it is nested more than {_DEPTH} levels deep")
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"it is not YAML: {' '.join(str(error).split())[:200]}") from error
