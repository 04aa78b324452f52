"""Loggers for services that may hang: calls run on a background thread, with a timeout."""

from __future__ import annotations

import atexit
import queue
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar, cast

from pydantic import Field

from nexus_core.bases.logger import Logger, LoggerConfig
from nexus_core.errors import CheckpointError
from nexus_core.images import Image, packed, unpacked
from nexus_core.plugin import hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.plugin import StateDict

__all__ = ["BackgroundConfig", "BackgroundLogger", "Ending", "Job", "Outcome", "RunInfo", "Worker"]

Line: TypeAlias = tuple[int, Mapping[str, float | str | Image]]
"""A step, and metrics by name, or text or images by title."""
Ending: TypeAlias = Literal["finished", "stopped", "failed"]
"""How a run ended: at its horizon, stopped early, or with an error."""


@dataclass(frozen=True)
class RunInfo:
    """What a service needs to know about a run.

    Args:
        name: name of the run folder; "run" without one.
        folder: absolute path of the run folder.
        step: optimizer steps done so far; above 0 if the run is resumed.
        config: the resolved settings.
        key: unique id of the run; a resumed run keeps that of its checkpoint.
    """

    name: str
    folder: Path | None
    step: int
    config: Mapping[str, Any]
    key: str


class BackgroundConfig(LoggerConfig):
    """Settings shared by all background loggers."""

    timeout: float = Field(
        default=30.0,
        gt=0,
        le=31_536_000,  # a year; a thread cannot wait for much more
        description="timeout of a call to the service, and of closing, in seconds; then the logger "
        "is switched off",
        json_schema_extra={"resume": "ignored"},
    )


BackgroundConfigT = TypeVar("BackgroundConfigT", bound=BackgroundConfig)


class BackgroundLogger(Logger[BackgroundConfigT]):
    """A logger that never blocks training, whatever its service does.

    Implement `connect`, `send` and `disconnect`, and `send_note` and `send_image` if the service
    stores text and images. They are called one at a time on the logger's own thread. A call that
    raises gives a warning; three failures in a row, or a failure of `connect`, switch the logger
    off. If a call exceeds `config.timeout`, the logger is switched off, and pending calls are
    dropped. At most `CAPACITY` calls may be pending; further ones count as failures. Closing waits
    for pending calls, but not longer than `config.timeout`.

    `RunInfo.key` identifies the run. Checkpoints contain the key, so a resumed run continues its
    record at the service, and the pending calls, so none are lost if the run is killed.
    """

    CAPACITY: ClassVar[int] = 1000
    _key: str | None = None
    _worker: Worker | None = None
    _stored: Mapping[str, int] | None = None  # None: not connected
    _broken: bool = False

    def _set_up(self) -> None:
        self._waiting: deque[Line] = deque()  # what has not been sent, in order

    def connect(self, run: RunInfo) -> Mapping[str, int]:
        """Start the run at the service, or resume it.

        Returns:
            The last stored step of each metric by name, and of each note or image by title; nothing
            up to that step is sent again.
        """
        raise NotImplementedError(f"{type(self).__name__}.connect")

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store metrics, by name, of an optimizer step."""
        raise NotImplementedError(f"{type(self).__name__}.send")

    def send_note(self, step: int, title: str, text: str) -> None:
        """Store a note of an optimizer step; does nothing by default.

        A resumed run may send it again, unless `connect` returns its title.
        """

    def send_image(self, step: int, title: str, image: Image) -> None:
        """Store an image of an optimizer step; does nothing by default.

        A resumed run may send it again, as with notes.
        """

    def disconnect(self, run: RunInfo, ending: Ending) -> None:
        """Flush, and report how the run ended."""

    def state_dict(self) -> StateDict:
        """The key of the run, and the pending lines."""
        if self._key is None:
            return {}
        waiting = [] if self.switched_off else list(self._waiting)
        return {"run": self._key, "waiting": [[step, packed(line)] for step, line in waiting]}

    def load_state_dict(self, state: StateDict) -> None:
        """Continue the run with this key, and send the pending lines."""
        key, waiting = state.get("run"), state.get("waiting")
        if not isinstance(key, str) or not isinstance(waiting, list):
            raise CheckpointError(f"the checkpoint's state of plugin '{self.name}' is {state}")
        self._key = key
        self._waiting = deque((step, unpacked(line)) for step, line in cast(list[Line], waiting))

    def open(self, engine: Engine) -> None:
        """Start the thread, connect, and send the lines that were pending in the checkpoint."""
        if self._key is None or engine.state.step == 0:
            self._key = secrets.token_hex(4)
            self._waiting.clear()
        waited, self._waiting = self._waiting, deque()
        self._stored, self._broken = None, False
        self._worker = Worker(self.name, self.CAPACITY)
        connect = partial(self._connect, self._info(engine))
        self._worker.submit(Job("open", engine.state.step, connect, vital=True))
        for step, content in waited:
            self._hand_over(step, content)

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Queue the metrics for the thread."""
        self._hand_over(engine.state.step, dict(metrics))

    def write_note(self, engine: Engine, title: str, text: str) -> None:
        """Queue the note for the thread."""
        self._hand_over(engine.state.step, {title: text})

    def write_image(self, engine: Engine, title: str, image: Image) -> None:
        """Queue the image for the thread."""
        self._hand_over(engine.state.step, {title: image})

    @hookimpl
    def on_error(self, error: BaseException) -> None:
        self._broken = True

    def close(self, engine: Engine) -> None:
        """Wait for pending calls, but not longer than `config.timeout`."""
        if self._worker is None or self.switched_off:
            return
        reached = engine.result().status == "finished"
        ending: Ending = "failed" if self._broken else "finished" if reached else "stopped"
        call = partial(self._disconnect, self._info(engine), ending)
        if not self._worker.finish(Job("close", engine.state.step, call), self.config.timeout):
            raise TimeoutError(f"not done within {self.config.timeout:g} s")

    def _info(self, engine: Engine) -> RunInfo:
        assert self._key is not None
        folder = engine.out.absolute() if engine.out is not None else None
        return RunInfo(
            folder.name if folder else "run", folder, engine.state.step, engine.config, self._key
        )

    def _connect(self, run: RunInfo) -> None:
        if self.writes_files and run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
        self._stored = dict(self.connect(run))

    def _hand_over(self, step: int, content: Mapping[str, float | str | Image]) -> None:
        if self._worker is not None:
            self._waiting.append((step, content))
            try:
                self._worker.submit(Job("write", step, partial(self._send, step, content)))
            except BufferError:
                self._waiting.pop()
                raise

    def _send(self, step: int, content: Mapping[str, float | str | Image]) -> None:
        stored = self._stored
        try:
            if stored is None:
                return
            new = {name: value for name, value in content.items() if step > stored.get(name, -1)}
            metrics = {n: value for n, value in new.items() if not isinstance(value, str | Image)}
            if metrics:
                self.send(step, metrics)
            for title, one in new.items():
                if isinstance(one, str):
                    self.send_note(step, title, one)
                elif isinstance(one, Image):
                    self.send_image(step, title, one)
        finally:
            self._waiting.popleft()

    def _disconnect(self, run: RunInfo, ending: Ending) -> None:
        if self._stored is not None:
            self.disconnect(run, ending)

    def _attempted(
        self, action: str, step: int, error: BaseException | None, fatal: bool = False
    ) -> None:
        """Process the outcomes of the calls that the thread has made since last time."""
        worker = self._worker
        if worker is None:
            super()._attempted(action, step, error, fatal)
            return
        outcomes = worker.outcomes()
        if late := worker.hanging(self.config.timeout):
            outcomes.append(
                Outcome(
                    late.action,
                    late.step,
                    TimeoutError(f"no answer within {self.config.timeout:g} s"),
                    fatal=True,
                )
            )
        if error is not None:
            outcomes.append(Outcome(action, step, error, fatal=action == "close"))
        for outcome in outcomes:
            if not self.switched_off:
                super()._attempted(outcome.action, outcome.step, outcome.error, outcome.fatal)
        if self.switched_off:
            worker.abandon()


@dataclass(frozen=True)
class Job:
    """A call to make.

    Args:
        action: what it does, for messages.
        step: the optimizer step it belongs to.
        call: the function to call.
        vital: whether its failure makes all later calls fail.
    """

    action: str
    step: int
    call: Callable[[], None]
    vital: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call: its error, if any, and whether it is fatal for the logger."""

    action: str
    step: int
    error: BaseException | None
    fatal: bool = False


class Worker:
    """A daemon thread that makes calls one at a time; submitting never blocks.

    Args:
        name: name of the thread.
        capacity: maximum number of pending calls.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(capacity)
        self._outcomes: deque[Outcome] = deque()
        self._present: tuple[Job, float] | None = None
        self._abandoned = False
        self._thread = Thread(target=self._run, name=f"nexus-{name}", daemon=True)
        atexit.register(self._part)  # registered before the service's handlers, so called later
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a call.

        Raises:
            BufferError: `capacity` calls are pending; this one is dropped.
        """
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BufferError(
                f"{self._jobs.maxsize:,} calls to the service are pending; this one is dropped"
            ) from None

    def outcomes(self) -> list[Outcome]:
        """The calls completed since the last request."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def hanging(self, timeout: float) -> Job | None:
        """The running call, if it has taken longer than `timeout` seconds."""
        present = self._present
        return present[0] if present and time.monotonic() - present[1] > timeout else None

    def finish(self, last: Job, timeout: float) -> bool:
        """Make a last call after the pending ones, and end the thread.

        Returns:
            Whether this was done within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        try:
            self._jobs.put(last, timeout=timeout)
            self._jobs.put(None, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            return False
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Drop pending calls; the thread ends after the running call, whenever that returns."""
        self._abandoned = True
        with suppress(queue.Full):  # a full queue wakes the thread anyway
            self._jobs.put_nowait(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._abandoned:
            self._present = job, time.monotonic()
            error: BaseException | None = None
            try:
                job.call()
            except BaseException as raised:  # no caller above this thread would see it
                error = raised
            self._outcomes.append(Outcome(job.action, job.step, error, fatal=job.vital))
            self._present = None
        atexit.unregister(self._part)

    def _part(self) -> None:
        """Give an abandoned call at most five seconds to return.

        A service's exit handler may wake that call, and a daemon thread that wakes inside native
        code while Python 3.13 or earlier shuts down kills the process with a signal.
        """
        self._thread.join(5.0 if self._present else 0.0)
