"""Processes that start at once, forked from one that has imported all; they may be killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.errors import ConfigError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

__all__ = ["free_port", "nursery", "stand_alone"]


def nursery(*modules: str) -> ForkServerContext:
    """What starts processes that have modules imported.

    Raises:
        ConfigError: this system cannot fork.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            "runs are started by forking, which this system does not have; do it on Linux or "
            "macOS, or on Windows within WSL"
        )
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(modules))
    return found


def free_port() -> int:
    """A port that nobody listens on, drawn from below those that the system gives out by itself.

    Two commands that start at once would else be given one port in turn, before either listens.
    """
    drawn = random.SystemRandom()
    while True:
        port = drawn.randrange(10_000, 32_768)
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)):
                return port


def stand_alone(log: Path) -> None:
    """Make this process one that can be killed with its workers, and that writes into a log.

    What a process makes that outlives it, such as the semaphores of its workers' queues, is
    removed by a tracker when the process has ended. The one that comes with the fork is that of
    the process which kills, and waits for the end of that one; so this process gets its own.
    """
    from multiprocessing import resource_tracker  # not on every system

    os.setpgid(0, 0)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(written, 1)
    os.dup2(written, 2)
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None  # it starts when there is something to track
