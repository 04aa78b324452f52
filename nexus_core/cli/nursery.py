"""Fast-starting processes, forked from one that has imported everything; they may be killed."""

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
    """A context that starts processes with modules already imported.

    Raises:
        ConfigError: this system cannot fork.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            "this command starts runs by forking, which this system lacks; use Linux or "
            "macOS, or on Windows within WSL"
        )
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(modules))
    return found


def free_port() -> int:
    """A free port, from below the range that the system assigns by itself.

    Otherwise two commands started at once could get the same port, before either listens.
    """
    drawn = random.SystemRandom()
    while True:
        port = drawn.randrange(10_000, 32_768)
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)):
                return port


def stand_alone(log: Path) -> None:
    """Let this process be killed together with its workers, and redirect its output to a log.

    A resource tracker removes what outlives this process, such as the semaphores of its workers'
    queues. The inherited one belongs to the parent and waits for the parent to end, so this process
    starts its own.
    """
    from multiprocessing import resource_tracker  # not on every system

    os.setpgid(0, 0)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(written, 1)
    os.dup2(written, 2)
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None  # it starts when there is something to track
