"""One run per folder: a second run cannot use the folder while the first is alive."""

from __future__ import annotations

import errno
import json
import os
import socket
import weakref
from datetime import datetime
from pathlib import Path

from nexus_core.errors import CheckpointError, hint_out
from nexus_plugins._shared.files import descriptor
from nexus_plugins._shared.locks import lock

__all__ = ["RunLock"]

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


class RunLock:
    """Holds `run.lock` in a run's folder until it is released or the process ends.

    The operating system releases the lock when the process ends, however it ends, so a crash leaves
    no stale lock. If the file system has no locks, the file's content decides: the holder's process
    id, its start time, and its host.

    Args:
        folder: of the run; created if missing.
        label: of the checkpoint instance, if a run has several.

    Raises:
        CheckpointError: another run holds it (the message gives its process id and start time), or
            the folder cannot be written.
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        self._path = folder / f"run{label and '@'}{label}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            opened = descriptor(self._path, os.O_RDWR | os.O_CREAT)
            self._file = os.fdopen(opened, "r+", encoding="utf-8")
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(
                    f"{self._path} is a link, and its target would be overwritten; remove it"
                ) from error
            raise CheckpointError(
                f"cannot write to the run folder {folder}: {error.strerror}; make it writable, or "
                "choose another: ",
                hint_out(),
            ) from error
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        # a forked worker must not keep the lock of a killed run
        itself = weakref.ref(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: _close_in_child(itself))

    def release(self) -> None:
        """Release the lock."""
        self._file.seek(0)
        self._file.truncate()
        self._file.close()

    def close(self) -> None:
        """Close the file without writing to it."""
        os.close(self._file.fileno())

    def _take(self) -> None:
        try:
            lock(self._file, wait=False)
        except BlockingIOError:
            raise self._taken(self._holder()) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            holder = self._holder()
            if holder and _alive(holder):
                raise self._taken(holder) from None
        self._file.seek(0)
        self._file.truncate()
        json.dump(
            {
                "pid": os.getpid(),
                "started": _start_of(os.getpid()),
                "host": socket.gethostname(),
                "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
            self._file,
        )
        self._file.flush()

    def _holder(self) -> dict[str, object]:
        self._file.seek(0)
        try:
            holder = json.load(self._file)
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _taken(self, holder: dict[str, object]) -> CheckpointError:
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
        return CheckpointError(
            f"the run folder {self._path.parent} is in use by {who} since "
            f"{holder.get('since', 'an unknown time')}; wait for it, stop it, or choose another: ",
            hint_out(),
            f" (if that run is long gone, remove {self._path})",
        )


def _close_in_child(lock: weakref.ref[RunLock]) -> None:
    held = lock()
    if held is not None and not held._file.closed:
        held.close()


def _alive(holder: dict[str, object]) -> bool:
    """Whether the process that wrote the lock is still running, as far as can be known."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    if os.name == "nt":  # there, any signal ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.get("started") in (None, _start_of(pid))


def _start_of(pid: int) -> str | None:
    """When a process started, in kernel ticks; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rsplit(")", 1)[1].split()[19]
