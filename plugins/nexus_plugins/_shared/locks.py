"""File locks that the operating system releases when a process ends, however it ends."""

from __future__ import annotations

import errno
import os
import time
from importlib import import_module
from typing import IO, Any

__all__ = ["lock"]

_BEYOND = 2**30
"""The byte to lock on Windows, far beyond the end, since locked bytes cannot be read there."""
_RETRY_S = 0.1


def lock(file: IO[Any], *, wait: bool) -> None:
    """Lock an open file against other processes, until it is closed.

    Args:
        file: open for writing.
        wait: wait until another process has released it.

    Raises:
        BlockingIOError: another process has it, and `wait` is False.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        _lock_byte(file.fileno(), wait)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _lock_byte(descriptor: int, wait: bool) -> None:
    msvcrt = import_module("msvcrt")
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _BEYOND, os.SEEK_SET)
    try:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if error.errno != errno.EACCES:
                    raise
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
            else:
                return
            time.sleep(_RETRY_S)
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)
