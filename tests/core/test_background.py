"""Failing loggers: training ends bitwise identical and on time, and the failure is reported."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus_core import CheckpointError, Engine, Logger, LoggerConfig
from nexus_core.bases.background import (
    BackgroundConfig,
    BackgroundLogger,
    Ending,
    Job,
    RunInfo,
    Worker,
)
from nexus_core.batches import Batch
from nexus_core.device import random_state
from nexus_core.images import Image
from tiny import Regression, tiny_engine, weights

STEPS = "5 steps"


def data() -> list[Batch]:
    rows = Regression()
    return [{"x": rows.x[i : i + 4], "y": rows.y[i : i + 4]} for i in range(0, 20, 4)]


class ServicePlugin(BackgroundLogger[BackgroundConfig]):
    """Stores what it is sent; tests plant failures in `trouble`, by call name."""

    name = "service"

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.trouble: dict[str, Callable[[], None]] = {}
        self.entered = threading.Event()
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.notes: list[tuple[int, str, str]] = []
        self.images: list[tuple[int, str, Image]] = []
        self.runs: list[RunInfo] = []
        self.endings: list[Ending] = []
        self.there: Mapping[str, int] = {}

    def connect(self, run: RunInfo) -> Mapping[str, int]:
        self._meet("connect")
        self.runs.append(run)
        return self.there

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        self._meet("send")
        self.lines.append((step, dict(metrics)))

    def send_note(self, step: int, title: str, text: str) -> None:
        self._meet("send_note")
        self.notes.append((step, title, text))

    def send_image(self, step: int, title: str, image: Image) -> None:
        self._meet("send_image")
        self.images.append((step, title, image))

    def disconnect(self, run: RunInfo, ending: Ending) -> None:
        self._meet("disconnect")
        self.endings.append(ending)

    def _meet(self, call: str) -> None:
        if call in self.trouble:
            self.entered.set()
            self.trouble[call]()


class FullDiskPlugin(Logger[LoggerConfig]):
    """Writes to a full device."""

    _stream: IO[str] | None = None

    def open(self, engine: Engine) -> None:
        self._stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115, PTH123

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        assert self._stream is not None
        self._stream.write(f"{metrics}\n")
        self._stream.flush()

    def close(self, engine: Engine) -> None:
        assert self._stream is not None
        self._stream.close()


def fail() -> None:
    raise ConnectionError("planted")


def exit_thread() -> None:
    raise SystemExit(3)


@pytest.fixture
def hang() -> Iterator[Callable[[], None]]:
    """A call that hangs for the duration of the test."""
    never = threading.Event()
    yield lambda: never.wait(60) and None
    never.set()


@dataclass(frozen=True)
class Trained:
    """A finished run: its engine, final generators and warnings."""

    engine: Engine
    generators: str
    warnings: list[str]


def trained(
    *plugins: ServicePlugin | FullDiskPlugin, each_step: Callable[[int], None] = lambda step: None
) -> Trained:
    """Train five steps, with a log after each, and an evaluation."""
    engine = tiny_engine(*plugins, dropout=0.2, log_every=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for state in engine.steps(data(), until=STEPS, eval_data=data()):
            each_step(state.step)
    return Trained(engine, repr(random_state()), [str(w.message) for w in seen])


def said(run: Trained) -> str:
    """The summary of the run."""
    answers = run.engine.hook.summarize(engine=run.engine)
    return "\n".join(f"{k}: {v}" for answer in answers for k, v in answer.items())


def assert_same_training(run: Trained) -> None:
    plain = trained()
    pairs = zip(weights(plain.engine), weights(run.engine), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert run.generators == plain.generators
    assert run.engine.metrics == plain.engine.metrics


def test_everything_arrives_in_order_under_its_step() -> None:
    """Fails if a line is lost, duplicated, or recorded under a later step."""
    service = ServicePlugin()
    run = trained(service)
    assert [step for step, _ in service.lines] == [1, 2, 3, 4, 5, 5]
    assert service.lines[-1][1].keys() == {"val/loss", "val/total_loss", "val/squared_loss"}
    assert service.endings == ["finished"]
    assert service.runs[0].step == 0
    assert (said(run), run.warnings) == ("", [])
    assert_same_training(run)


@pytest.mark.parametrize("trouble", [fail, exit_thread])
def test_calls_that_raise_switch_it_off_and_are_said(trouble: Callable[[], None]) -> None:
    """Fails if a failing service stops or changes training, or goes unnoticed."""
    service = ServicePlugin()
    service.trouble["send"] = trouble
    run = trained(service)
    assert [warning.rpartition("; ")[2] for warning in run.warnings] == [
        "continuing",
        "continuing",
        "it is switched off",
    ]
    assert said(run).startswith("logger service: failed 3 times, last to write at step 3")
    assert said(run).endswith("switched off")
    assert_same_training(run)


def test_a_service_that_cannot_be_reached_is_given_up_at_once() -> None:
    """Fails if every log of a run fails again after a failed connection."""
    service = ServicePlugin()
    service.trouble["connect"] = fail
    run = trained(service)
    (warning,) = run.warnings
    assert "failed to open at step 0 (ConnectionError: planted); it is switched off" in warning
    assert service.lines == []
    assert "failed once, last to open" in said(run)
    assert_same_training(run)


@pytest.mark.parametrize("call", ["connect", "send", "disconnect"])
def test_a_call_that_hangs_is_given_up(call: str, hang: Callable[[], None]) -> None:
    """Fails if a hanging network blocks training, or its end, for longer than the timeout."""
    service = ServicePlugin(timeout=0.05)
    service.trouble[call] = hang
    before = time.monotonic()
    run = trained(service)
    assert time.monotonic() - before < 20, "the call itself takes a minute"
    (warning,) = run.warnings
    assert "TimeoutError" in warning
    assert said(run).endswith("switched off")
    assert_same_training(run)


WOKEN = """
import atexit, threading
from pydantic import BaseModel, field_validator
from nexus_core.bases.background import BackgroundConfig, BackgroundLogger
from tiny import tiny_engine

class Value(BaseModel):
    x: int

    @field_validator("x")
    @classmethod
    def check(cls, x):
        return x + sum(range(100))

class ServicePlugin(BackgroundLogger[BackgroundConfig]):
    def connect(self, run):
        woken = threading.Event()
        atexit.register(woken.set)
        woken.wait()
        for x in range(100_000):
            Value(x=x)
        print("woken", flush=True)
        raise ConnectionError("closed")

batch = {"x": __import__("torch").ones(2, 5), "y": __import__("torch").ones(2, 4)}
print(tiny_engine(ServicePlugin(timeout=0.2)).fit([batch] * 5, until="5 steps").status, flush=True)
"""


@pytest.mark.slow
def test_a_call_that_the_service_wakes_at_exit_comes_to_its_end() -> None:
    """Fails if Python shuts down while a thread is in native code, which ends in a signal."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", WOKEN],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "finished\nwoken\n"


def test_a_hang_is_noticed_while_the_run_goes_on(hang: Callable[[], None]) -> None:
    """Fails if a hanging logger is only noticed at the end of a long run."""
    service = ServicePlugin(timeout=1e-9)
    service.trouble["connect"] = hang
    off: list[bool] = []

    def each_step(step: int) -> None:
        service.entered.wait(10)
        off.append(service.switched_off)

    run = trained(service, each_step=each_step)
    assert off[1:] == [True] * 4
    assert "failed to open at step 0 (TimeoutError: no answer within" in run.warnings[0]


def test_a_full_disk_is_said_and_changes_nothing() -> None:
    """Fails if a full disk ends a run because of a logger."""
    run = trained(FullDiskPlugin())
    assert all("No space left" in warning for warning in run.warnings)
    assert len(run.warnings) == 4, "three lines, and what is left when the file is closed"
    assert "No space left" in said(run)
    assert said(run).endswith("switched off")
    assert_same_training(run)


def test_what_waits_is_bounded() -> None:
    """Fails if a slow service exhausts memory."""

    class SmallPlugin(ServicePlugin):
        name = "small"
        CAPACITY = 2
        sent = threading.Semaphore(0)

        def send(self, step: int, metrics: Mapping[str, float]) -> None:
            super().send(step, metrics)
            self.sent.release()

    service, free = SmallPlugin(), threading.Event()
    service.trouble["connect"] = lambda: free.wait(60) and None

    def each_step(step: int) -> None:
        service.entered.wait(10)
        if step == 4:
            free.set()
            assert service.sent.acquire(timeout=10)
            assert service.sent.acquire(timeout=10)

    run = trained(service, each_step=each_step)
    assert "BufferError: 2 calls to the service are pending" in run.warnings[0]
    assert said(run).startswith("logger small: failed")
    assert [step for step, _ in service.lines][:2] == [1, 2]


def test_the_end_of_a_failed_run_is_told() -> None:
    """Fails if the service shows a crashed run as finished."""
    service = ServicePlugin()
    batches = data()
    batches[2] = {}
    with pytest.raises(KeyError):
        tiny_engine(service).fit(batches, until=STEPS)
    assert service.endings == ["failed"]


def test_a_resumed_run_keeps_its_key_and_sends_what_is_missing() -> None:
    """Fails if a resumed run becomes a second run, or lines are duplicated or missing."""
    first = ServicePlugin()
    engine = tiny_engine(first, log_every=1)
    for state in engine.steps(data(), until="9 steps"):
        if state.step == 2:
            snapshot = engine.state_dict()
        if state.step == 4:
            break
    second = ServicePlugin()
    second.there = dict.fromkeys(first.lines[0][1], 4) | {"train/learning_rate": 3}
    again = tiny_engine(second, log_every=1)
    again.load_state_dict(snapshot)
    again.fit(data(), until="9 steps")
    assert second.runs[0].key == first.runs[0].key
    assert second.runs[0].step == 2
    assert [step for step, _ in second.lines] == [4, 5, 6, 7, 8, 9]
    assert second.lines[0][1].keys() == {"train/learning_rate"}


def test_what_waited_when_the_run_was_killed_is_sent_by_the_next(hang: Callable[[], None]) -> None:
    """Fails if lines from before the checkpoint are lost because the thread lagged behind."""
    first = ServicePlugin()
    first.trouble["connect"] = hang
    engine = tiny_engine(first, log_every=1)
    steps = engine.steps(data(), until="6 steps")
    for state in steps:
        if state.step == 3:
            snapshot = copy.deepcopy(engine.state_dict())
            break
    second = ServicePlugin()
    second.there = {"train/total_loss": 1}
    again = tiny_engine(second, log_every=1)
    again.load_state_dict(snapshot)
    again.fit(data(), until="6 steps")
    assert [step for step, _ in second.lines] == [1, 2, 3, 4, 5, 6]
    assert "train/total_loss" not in second.lines[0][1]
    assert "train/total_loss" in second.lines[1][1]
    assert second.state_dict() == {"run": second.runs[0].key, "waiting": []}
    first.config = BackgroundConfig(timeout=1e-9)
    with pytest.warns(RuntimeWarning, match="switched off"):
        steps.close()


def test_notes_wait_with_the_lines_and_are_sent_by_the_next(hang: Callable[[], None]) -> None:
    """Fails if notes are lost in a kill, or are passed to `send` like metrics."""
    first = ServicePlugin()
    first.trouble["connect"] = hang
    engine = tiny_engine(first, log_every=1)
    steps = engine.steps(data(), until="4 steps")
    for state in steps:
        engine.note("talk", f"step {state.step}")
        engine.note("shown", image=torch.eye(state.step))
        if state.step == 2:
            snapshot = copy.deepcopy(engine.state_dict())
            break
    second = ServicePlugin()
    again = tiny_engine(second, log_every=1)
    again.load_state_dict(snapshot)
    for _ in again.steps(data(), until="4 steps"):
        again.note("talk", f"step {again.state.step}")
        again.note("shown", image=torch.eye(again.state.step))
    assert second.notes == [(step, "talk", f"step {step}") for step in (1, 2, 3, 4)]
    assert second.images == [(s, "shown", Image.of(torch.eye(s))) for s in (1, 2, 3, 4)]
    assert [step for step, _ in second.lines] == [1, 2, 3, 4]
    assert not any({"talk", "shown"} & line.keys() for _, line in second.lines)
    first.config = BackgroundConfig(timeout=1e-9)
    with pytest.warns(RuntimeWarning, match="switched off"):
        steps.close()


def test_a_service_that_refuses_words_goes_on_with_numbers() -> None:
    """Fails if a failing note stops the metrics or the run."""
    service = ServicePlugin()
    service.trouble["send_note"] = fail
    engine = tiny_engine(service, log_every=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for state in engine.steps(data(), until=STEPS):
            if state.step == 2:
                engine.hook.on_note(engine=engine, title="talk", text="words")
    assert [step for step, _ in service.lines] == [1, 2, 3, 4, 5]
    (warning,) = seen
    assert "'service' failed to write at step 2 (ConnectionError: planted)" in str(warning.message)


def test_another_run_has_another_key() -> None:
    """Fails if two runs are mixed in one curve."""
    services = ServicePlugin(), ServicePlugin()
    for service in services:
        tiny_engine(service).fit(data(), until="2 steps")
    assert services[0].runs[0].key != services[1].runs[0].key


def test_a_checkpoint_with_a_broken_key_is_refused() -> None:
    """Fails if a damaged checkpoint leads to an invalid run name at the service."""
    with pytest.raises(CheckpointError, match="'service' is {'run': 7"):
        ServicePlugin().load_state_dict({"run": 7, "waiting": []})


def test_no_thread_is_left_behind() -> None:
    """Fails if each run in a process leaves a thread behind."""
    before = threading.active_count()
    for _ in range(3):
        tiny_engine(ServicePlugin()).fit(data(), until="2 steps")
    assert threading.active_count() == before


@given(st.lists(st.booleans(), max_size=12))
def test_the_worker_makes_every_call_in_order_whatever_fails(good: list[bool]) -> None:
    """Fails if a call that raises ends the thread or hides another call's outcome."""
    made: list[int] = []

    def call(number: int) -> None:
        made.append(number)
        if not good[number]:
            fail()

    worker = Worker("test", 20)
    for number in range(len(good)):
        worker.submit(Job("call", number, lambda number=number: call(number)))
    assert worker.finish(Job("last", len(good), lambda: None), 10)
    assert made == list(range(len(good)))
    assert [outcome.error is None for outcome in worker.outcomes()] == [*good, True]
    assert worker.outcomes() == []
