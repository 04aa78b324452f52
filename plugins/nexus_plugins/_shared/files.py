"""Files where somebody else may have put some: no link is followed, and what is read is bounded."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from nexus_core.errors import CheckpointError

__all__ = ["opened", "read_small", "write_whole"]


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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing; a link in its place is replaced, and not followed."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    with draft.open("xb") as file:
        file.write(content)
    draft.replace(path)
