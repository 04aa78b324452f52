"""Safe access to untrusted files: no link is followed, and reads are bounded."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

from nexus_core.errors import CheckpointError

__all__ = ["descriptor", "opened", "read_small", "write_whole"]

_FOLLOWS = not hasattr(os, "O_NOFOLLOW")
_FLAGS = sum(
    getattr(os, flag, 0)  # flags of POSIX and of Windows
    for flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")
)


def descriptor(path: Path, flags: int) -> int:
    """Open a file that is not a link, in binary mode, not inherited by child processes.

    Raises:
        OSError: it cannot be opened, or is a link (ELOOP).
    """
    if _FOLLOWS and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | _FLAGS, 0o644)


def opened(path: Path) -> FileIO:
    """Open a regular file in the folder: not a link, pipe or device.

    Raises:
        OSError: it cannot be opened, or is a link.
        CheckpointError: it is another kind of file.
    """
    opened = descriptor(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise CheckpointError("it is not a regular file")
    return FileIO(opened, "r")


def read_small(path: Path, limit: int) -> bytes:
    """Read a regular file that is not a link and not larger than a limit.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is a link, too large, or not a regular file.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{size} bytes exceed the limit of {limit}")
        return file.read(limit)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically; an existing link is replaced, not followed."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    with draft.open("xb") as file:
        file.write(content)
    draft.replace(path)
