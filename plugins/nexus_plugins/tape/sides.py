"""Re-execute two runs in separate processes: they may have different code under one name."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self, cast

import torch
from torch import Tensor

from nexus_core.cli.nursery import nursery
from nexus_core.errors import ConfigError, NexusError, RunError
from nexus_plugins.tape.again import Recorded, executed
from nexus_plugins.tape.lines import Line
from nexus_plugins.tape.looking import LookingProbe
from nexus_plugins.tape.probe import Moment

__all__ = ["Side", "Taken"]


@dataclass(frozen=True)
class Taken:
    """A re-executed step, and the steps since the checkpoint before it.

    Args:
        begin: the step of the checkpoint.
        moments: moments of the step, in order.
        lines: tape lines, by step.
        notes: how the rebuilt run differs from the original.
    """

    begin: int
    moments: Sequence[Moment] = ()
    lines: dict[int, Line] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Side:
    """A process that re-executes steps of one run on request.

    Args:
        recorded: the run.
    """

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded

    def __enter__(self) -> Self:
        processes = nursery("nexus_plugins.tape.sides")
        self._connection, theirs = processes.Pipe()
        self._process = processes.Process(target=_live, args=(theirs, self._recorded), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()

    def begin(self, step: int, *, begin: int | None = None, operations: bool = False) -> None:
        """Request a step; `taken` waits for it."""
        begin = self._recorded.before(step - 1) if begin is None else begin
        self._connection.send(("take", begin, step, operations))

    def taken(self) -> Taken:
        """The requested step.

        Raises:
            NexusError: it cannot be re-executed.
        """
        return cast(Taken, self._answer())

    def value(self, place: int) -> Tensor | None:
        """The tensor of a moment of the last step taken."""
        self._connection.send(("value", place))
        found = self._answer()
        if not isinstance(found, bytes):
            return None
        return cast(Tensor, torch.load(io.BytesIO(found), weights_only=True))

    def _answer(self) -> Any:
        try:
            kind, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise RunError(
                f"the process re-executing '{self._recorded.folder}' ended with exit "
                f"code {self._process.exitcode}"
            ) from None
        if kind == "mistake":
            raise ConfigError(f"'{self._recorded.folder}' cannot be re-executed: {answer}")
        if kind == "failure":
            raise RunError(f"'{self._recorded.folder}', re-executed, failed: {answer}")
        return answer


def _live(connection: Connection, recorded: Recorded) -> None:
    """In a separate process: answer requests until the other end closes."""
    with suppress(BrokenPipeError, ConnectionResetError):
        _serve(connection, recorded)


def _serve(connection: Connection, recorded: Recorded) -> None:
    os.chdir(recorded.directory)
    moments: list[Moment] = []
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            if request[0] == "value":
                connection.send(("answer", _saved(moments[request[1]].value)))
                continue
            _, begin, step, operations = request
            probe = LookingProbe(step, operations=operations)
            again = executed(recorded, begin, step, watch=probe)
            moments = probe.moments
            bare = [moment.bare() for moment in moments]
            connection.send(("answer", Taken(begin, bare, again.lines, again.notes)))
        except NexusError as error:
            connection.send(("mistake" if error.exit_code == 2 else "failure", str(error)))
        except Exception as error:  # of user code; passed on to the requesting process
            connection.send(("failure", f"{type(error).__name__}: {error}"))


def _saved(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()
