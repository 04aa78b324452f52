"""Synchronization of the host with the accelerator, and asynchronous copies."""

from __future__ import annotations

import linecache
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeAlias

import torch
from torch import Tensor

from nexus_core.testing.accelerator.memory import fill_with_garbage

__all__ = ["Listener", "Wait", "Waits", "callers"]

Listener: TypeAlias = Callable[[str, FrameType], None]
"""Called with the cause of a wait, and the frame that caused it."""

_OURS = ("torch", "nexus_core.testing.accelerator")


@dataclass(frozen=True)
class Wait:
    """A point where the host waits until the accelerator has finished its work.

    Attributes:
        what: the cause of the wait.
        file: file of the line that causes it, the innermost outside torch.
        line: line number, from 1.
        function: function that contains the line.
    """

    what: str
    file: str
    line: int
    function: str

    @property
    def text(self) -> str:
        """The source text of the line."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{self.what} at {self.file}:{self.line} in {self.function}: {self.text}"


@dataclass(frozen=True)
class _Pinned:
    """A pending copy to the device: its source, and the source's content when it was issued."""

    source: Tensor
    value: Tensor
    asked: Wait


class Waits:
    """The accelerator's pending work, and the recorded waits of the host.

    Attributes:
        seen: every wait, oldest first.
        listeners: called with each wait.
        mode: as in `torch.cuda.set_sync_debug_mode`: "default", "warn" or "error".
        capturing: whether a graph is being captured, which makes waiting an error.
    """

    def __init__(self) -> None:
        self.seen: list[Wait] = []
        self._thread = threading.get_ident()
        self.listeners: list[Listener] = []
        self.mode = "default"
        self.capturing = False
        self._arriving: list[tuple[Tensor, Tensor]] = []
        self._leaving: list[_Pinned] = []

    def wait(self, what: str) -> None:
        """Record a wait of the host, and complete pending copies.

        Waits of threads other than the training thread are not recorded.

        Raises:
            RuntimeError: pinned memory was written to before it was copied; or waiting is an error.
        """
        self.refuse(what)
        if threading.get_ident() == self._thread:
            frame = next(callers())
            self.seen.append(_wait(what, frame))
            for listener in self.listeners:
                listener(what, frame)
            self._say(_wait(what, frame))
        self.settle()

    def refuse(self, what: str) -> None:
        """Check that no graph is being captured.

        Raises:
            RuntimeError: a graph is being captured.
        """
        if self.capturing and threading.get_ident() == self._thread:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    def _say(self, wait: Wait) -> None:
        said = f"called a synchronizing operation: {wait.what}"
        if self.mode == "error":
            raise RuntimeError(said)
        if self.mode == "warn":
            warnings.warn_explicit(said, UserWarning, wait.file, wait.line)

    def arrive_late(self, target: Tensor, value: Tensor) -> None:
        """Copy a value to host memory at the next wait; until then the memory holds garbage."""
        fill_with_garbage(target)
        self._arriving.append((target, value))

    def leave_late(self, source: Tensor) -> None:
        """Register pinned memory that must not change until the next wait."""
        self._leaving.append(_Pinned(source, source.clone(), _wait("a copy", next(callers()))))

    def settle(self) -> None:
        """Complete all pending work."""
        arriving, self._arriving = self._arriving, []
        leaving, self._leaving = self._leaving, []
        for target, value in arriving:
            target.copy_(value)
        for copy in leaving:
            if not torch.equal(copy.source, copy.value):
                asked = copy.asked
                raise RuntimeError(
                    "pinned memory was overwritten before its copy to the device, requested at "
                    f"{asked.file}:{asked.line}: {asked.text}, had completed; wait for the copy, "
                    "or write elsewhere"
                )


def callers() -> Iterator[FrameType]:
    """The frames outside torch and this accelerator, innermost first."""
    return _frames(sys._getframe(1))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if not any(module == own or module.startswith(f"{own}.") for own in _OURS):
            yield frame
        frame = frame.f_back


def _wait(what: str, frame: FrameType) -> Wait:
    code = frame.f_code
    return Wait(what, code.co_filename, frame.f_lineno, code.co_name)
