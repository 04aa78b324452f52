"""The console: plain lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn

from nexus_core import Engine, Plugin, PluginConfig, hookimpl
from nexus_core.testing import tiny_engine
from nexus_plugins.console import ConsolePlugin
from nexus_plugins.throughput import ThroughputPlugin

DATA = [torch.ones(2, 2)]


def engine_of(plugins: Sequence[Plugin[Any]] = (), **settings: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, b: m(b).square().mean(),
        plugins=[ThroughputPlugin(), ConsolePlugin(**settings), *plugins],
        log_every=2,
    )


def test_off_a_terminal_each_log_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a line lacks progress, loss, speed or remaining time."""
    engine_of(every=None).fit(DATA, until="6 steps", eval_data=DATA, eval_every="4 steps")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 2/6",
        "step 4/6",
        "step 4/6",
        "step 6/6",
        "step 6/6",
    ]
    pattern = r"step 2/6  loss [\d.]{5,7}  [\d.]+k? tok/s  lr 1\.00e-01  \d\d:\d\d left"
    assert re.fullmatch(pattern, lines[0])
    assert re.fullmatch(r"step 4/6  val: loss [\d.]+(e-\d\d)?", lines[2])
    assert "left" not in lines[3]


def test_a_character_that_the_output_has_not_is_written_as_an_escape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a metric with an umlaut switches the console off."""
    taken = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(taken, "latin-1", write_through=True))
    engine_of(every=None).fit(DATA, until="2 steps", eval_data={"läufe-😀": DATA})
    assert "läufe-\\U0001f600: loss" in taken.getvalue().decode("latin-1")


def test_every_holds_lines_back_but_never_the_first_and_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a long run floods its log, or the loss at an evaluation or at the end is missing."""
    data = {"eval_data": DATA, "eval_every": "10 steps"}
    engine_of(every="6 steps").fit(DATA, until="16 steps", **data)
    output = capsys.readouterr().out
    assert "\r" not in output
    assert "\x1b" not in output
    lines = [line.split("  ") for line in output.splitlines()]
    assert [(place.split("/")[0], said.split()[0]) for place, said, *_ in lines] == [
        *(("step 2", "loss"), ("step 6", "loss"), ("step 10", "loss"), ("step 10", "val:")),
        *(("step 12", "loss"), ("step 16", "loss"), ("step 16", "val:")),
    ]


def test_the_place_is_in_the_unit_of_the_horizon(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a run of 2 epochs is shown without its end."""
    engine_of(every=None).fit(DATA * 4, until="2 epochs")
    assert "step 2  25.0% of 2 epochs" in capsys.readouterr().out


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if `quiet` prints lines."""
    engine_of(quiet=True).fit(DATA, until="4 steps", eval_data=DATA)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[list[bytes]]:
    """The error stream on a pseudo-terminal, and its screen content."""
    shown, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, columns))
    screen: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # raised when the other end is closed
            while part := os.read(shown, 65536):
                screen.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(inside, "w") as stream:
        patch.setattr(sys, "stderr", stream)
        yield screen
    reader.join()
    os.close(shown)


@pytest.mark.parametrize("columns", [120, 0])
def test_on_a_terminal_a_bar_moves_to_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    """Fails if the bar is missing, in the wrong unit, incomplete, or hides evaluations."""
    with terminal(monkeypatch, columns) as screen:
        engine_of().fit(DATA, until="40 samples", eval_data=DATA, eval_every="10 steps")
    text = b"".join(screen).decode()
    assert capsys.readouterr().out == "", "with a bar there are no plain lines"
    assert re.search(r" 10%\|.*\| 4/40 samples \[", text)
    assert re.search(r"100%\|.*\| 40/40 samples \[", text)
    assert re.search(r"\], loss [\d.]+  [\d.]+[kMG]? tok/s  lr 1\.00e-01", text)
    assert re.search(r"step 10  50\.0% of 40 samples  val: loss", text)


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_gets_whole_lines_and_whole_numbers(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Fails if the terminal wraps a line, or a metric is cut within its digits."""
    many = {f"set_{n}": DATA for n in range(2)}
    with terminal(monkeypatch, columns) as screen:
        engine_of(verbose=True).fit(
            DATA, until="400 samples", eval_data=many, eval_every="100 steps"
        )
    lines = re.split(r"\r\n?|\n", re.sub(r"\x1b\[\w", "", b"".join(screen).decode()))
    assert max(map(len, lines)) <= columns
    shown = [line.partition("], ")[2].rstrip() for line in lines if "%|" in line]
    whole = r"loss [\d.]+(e-\d\d)?(  [\d.]+[kMG]? tok/s(  lr 1\.00e-01)?)?"
    assert [text for text in shown if text and not re.fullmatch(whole, text)] == []
    assert shown[-1]
    assert ("lr" in shown[-1]) == (columns == 80)


class ChattyPlugin(Plugin[PluginConfig]):
    """Prints in all the ways that people do."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        print("alive at", engine.state.step)
        print("half a ", end="")
        print("line\nand a bit", end="", file=sys.stderr)
        print("line")


def test_what_a_program_prints_is_on_lines_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a plugin's print joins the bar's line, or leaves parts of a bar behind."""
    with terminal(monkeypatch, 60) as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream := sys.stderr)
        engine = engine_of(plugins=[ChattyPlugin()])
        engine.fit(DATA, until="2 steps", eval_data=DATA)
        assert sys.stdout is sys.stderr is stream
    seen = [as_seen(line) for line in b"".join(screen).decode().split("\r\n")]
    said = ["alive at 1", "line", "half a line", "alive at 2", "and a bitline", "half a line"]
    assert [line for line in seen if "%|" not in line and "val" not in line] == [
        *said, "and a bit", "",
    ]  # fmt: skip
    assert [line for line in seen if "%|" in line] == [seen[-2]], "one bar, and it is the last"


def as_seen(line: str) -> str:
    """A line after all returns to its beginning."""
    seen = ""
    for part in line.split("\r"):
        seen = part + seen[len(part) :]
    return seen.rstrip()


class Wrapped(io.StringIO):
    """A wrapped terminal without a file descriptor, as in some consoles."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_without_a_file_has_a_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the console fails to open where the error stream is wrapped."""
    monkeypatch.setattr(sys, "stderr", stream := Wrapped())
    engine_of().fit(DATA, until="3 steps")
    assert "3/3 steps" in stream.getvalue()


def test_the_bar_moves_between_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that logs rarely looks as if it had stopped."""
    seconds = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(seconds)))
    with terminal(monkeypatch, 80) as screen:
        engine_of().fit(DATA, until="9 steps")
    places = re.findall(r"(\d)/9 steps", b"".join(screen).decode())
    assert list(dict.fromkeys(places)) == list("0123456789")


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a closed terminal ends the run, or causes a warning at each step."""
    for name in ("update", "set_postfix_str"):
        monkeypatch.setattr(f"tqdm.std.tqdm.{name}", raise_gone)
    with terminal(monkeypatch, 80), pytest.warns(RuntimeWarning) as seen:
        assert engine_of().fit(DATA, until="9 steps").status == "finished"
    said = [str(warning.message) for warning in seen]
    assert len(said) <= 4
    assert any("failed to move its bar at step" in one for one in said)
    assert any("it is switched off" in one for one in said)


def raise_gone(*_: object, **__: object) -> None:
    raise OSError("gone")


def test_a_resumed_bar_starts_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a resumed run is shown from zero, with too much time left."""
    with terminal(monkeypatch, 120) as screen:
        engine = engine_of()
        engine.state.step = 30
        engine.fit(DATA, until="40 steps")
    places = re.findall(r"(\d+)/40 steps", b"".join(screen).decode())
    assert places[0] == "30"
    assert places[-1] == "40"


class Shell:
    """A fake IPython shell of a kernel, and its notebook's output."""

    kernel = "a kernel"

    def __init__(self) -> None:
        self.outputs: list[str] = []
        self.updates = 0

    def get_ipython(self) -> Shell:
        return self

    def display(self, shown: Any, display_id: bool) -> Shell:
        self.outputs.append(shown._repr_html_())
        return self

    def update(self, shown: Any) -> None:
        self.outputs[-1] = shown._repr_html_()
        self.updates += 1


def test_in_a_notebook_one_output_is_the_bar_and_evaluations_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if lines repeat the bar, or the saved output is not the final state."""
    shell = Shell()
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", shell)
    engine_of().fit(DATA, until="80 steps", eval_data=DATA, eval_every="40 steps")
    (bar,) = shell.outputs
    assert "<progress value='80' max='80'" in bar
    assert re.search(r"100%  80/80 steps \[.*loss \d\.\d+  .*lr 1\.00e-01", bar)
    assert 1 <= shell.updates < 20, "not each of 40 logs within a few milliseconds"
    captured = capsys.readouterr()
    assert [line[:10] for line in captured.out.splitlines()] == ["step 40/80", "step 80/80"]
    assert captured.err == ""
    engine_of(quiet=True).fit(DATA, until="2 steps")
    assert len(shell.outputs) == 1


@pytest.mark.parametrize("verbose", [False, True])
def test_an_evaluation_is_its_headline_and_each_loss_term_on_request(
    verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tiny_engine(ConsolePlugin(every=None, verbose=verbose))
    engine.fit(until="1 step")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "val: " in line]
    assert " loss " in line
    assert ("tiny_next_loss" in line, "total_loss" in line) == (verbose, verbose)
