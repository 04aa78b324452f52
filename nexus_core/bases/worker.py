"""The lifetime of loader workers: neither shorter nor longer than that of the training process.

A terminal, a scheduler or torchrun signals the whole process group. The run finishes its step and
saves, so its workers must keep running. A killed run cannot stop its workers, and under some of
Python's start methods these are not its children.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from multiprocessing.util import Finalize

__all__ = ["attend", "leaving", "signals_held"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PERIOD_S = 1.0
"""How often a worker checks whether its parent process has changed."""


def leaving(owner: object, event: Event) -> None:
    """Set the event when the owner of workers is collected, or this process exits.

    From then on its workers obey SIGTERM, which now comes from their own process.
    """
    Finalize(owner, event.set, exitpriority=100)  # before multiprocessing terminates its children


@contextmanager
def signals_held() -> Iterator[None]:
    """Block stop signals, here and in processes started in the block until they call `attend`.

    Children of a fork server block them only if the server itself was started in the block.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def attend(leaving: Event, _worker: int) -> None:
    """In a worker: live exactly as long as the training process. Used as a `worker_init_fn`.

    It installs Python handlers, which programs started by a data set do not inherit, unlike a
    signal mask.

    Args:
        leaving: the event of `leaving`.
    """

    def obey(*_: object) -> None:
        if leaving.is_set():
            os._exit(0)  # otherwise PyTorch reports a failure

    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, obey)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Exit when the training process is gone.

    Its exit closes a pipe, unless a process forked after this one holds a copy; in that case the
    parent of this process changes. The parent of a process forked by a server is the server.
    """
    trains = multiprocessing.parent_process()
    sentinels = [] if trains is None else [trains.sentinel]
    while os.getppid() == parent:
        if wait(sentinels, _PERIOD_S):
            break
    os._exit(1)
