"""Where the host waits for the accelerator, and the copies that it does not wait for."""

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
"""Told what is waited for, and the frame that asked for it."""

_OURS = ("torch", "nexus_core.testing.accelerator")


@dataclass(frozen=True)
class Wait:
    """A place where the host waits until the accelerator has done all its work.

    Attributes:
        what: is waited for.
        file: of the line that asks for it, the first outside of torch.
        line: its number, from 1.
        function: that it is in.
    """

    what: str
    file: str
    line: int
    function: str

    @property
    def text(self) -> str:
        """The line itself."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{self.what} at {self.file}:{self.line} in {self.function}: {self.text}"


@dataclass(frozen=True)
class _Pinned:
    """A copy to the device that may not have begun: what it reads from, and what was there."""

    source: Tensor
    value: Tensor
    asked: Wait


class Waits:
    """The work that the accelerator has not done yet, and the times that the host waited for it.

    Attributes:
        seen: every wait, oldest first.
        listeners: told of each as it happens.
        mode: what `torch.cuda.set_sync_debug_mode` is told: "default", "warn" or "error".
        capturing: a graph is being captured: waiting is an error then.
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
        """The host waits: note it, and let the copies arrive.

        What a thread beside the one that trains waits for holds up nobody.

        Raises:
            RuntimeError: pinned memory was written to before it was copied; or nobody may wait.
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
        """See that no graph is being captured.

        Raises:
            RuntimeError: one is.
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
        """Copy a value to memory of the host when the host waits; until then there is garbage."""
        fill_with_garbage(target)
        self._arriving.append((target, value))

    def leave_late(self, source: Tensor) -> None:
        """Pinned memory is read from until the host waits, and must stay as it is."""
        self._leaving.append(_Pinned(source, source.clone(), _wait("a copy", next(callers()))))

    def settle(self) -> None:
        """All work is done."""
        arriving, self._arriving = self._arriving, []
        leaving, self._leaving = self._leaving, []
        for target, value in arriving:
            target.copy_(value)
        for copy in leaving:
            if not torch.equal(copy.source, copy.value):
                asked = copy.asked
                raise RuntimeError(
                    "pinned memory was written to before its copy to the device had been made, as "
                    f"asked for at {asked.file}:{asked.line}: {asked.text}; wait for the copy, or "
                    "write elsewhere"
                )


def callers() -> Iterator[FrameType]:
    """The frames outside of torch and of this accelerator, the innermost first."""
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
