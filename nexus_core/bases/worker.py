"""What a process that reads ahead owes to the one that trains: not to die before it, nor after it.

A signal to stop goes to a whole group of processes: from a terminal, a scheduler, or torchrun. The
run finishes its step and saves, for which its workers must live on. And a run that is killed has no
time to end its workers, which under the start methods of Python are not always its children.
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
"""How often a worker looks whether its parent is another process than before."""


def leaving(owner: object, event: Event) -> None:
    """Set the event when the owner of workers goes, or this process ends.

    From then on, its workers obey a SIGTERM, which is that of their own process.
    """
    Finalize(owner, event.set, exitpriority=100)  # before multiprocessing ends what is left


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals to stop, here and in processes started meanwhile until they `attend`.

    What a fork server starts holds them back only where the server itself was started within.
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
    """In a worker: live exactly as long as the process that trains. A `worker_init_fn`.

    Handlers of Python are not inherited by programs that a data set starts; a mask would be.

    Args:
        leaving: see there.
    """

    def obey(*_: object) -> None:
        if leaving.is_set():
            os._exit(0)  # else PyTorch takes it for a failure

    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, obey)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this process when the one that trains is gone.

    Its end closes a pipe, but not where a process forked after this one holds a copy of it; then
    this one has another parent. A process that a server forks has the server for its parent.
    """
    trains = multiprocessing.parent_process()
    sentinels = [] if trains is None else [trains.sentinel]
    while os.getppid() == parent:
        if wait(sentinels, _PERIOD_S):
            break
    os._exit(1)
