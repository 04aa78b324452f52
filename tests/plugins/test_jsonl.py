"""The metrics file: complete, readable, and without repeated lines after a crash."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.jsonl import JsonlPlugin

DATA = [torch.ones(2, 2)]


def engine_of(
    out: Path | None, scale: float = 1.0, plugins: Sequence[Plugin[Any]] = (), **settings: Any
) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, b: m(b).square().mean() * scale,
        plugins=[JsonlPlugin(), *plugins],
        out=out,
        **{"log_every": 2, **settings},
    )


def lines_of(out: Path) -> list[dict[str, Any]]:
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_each_log_and_each_evaluation_is_a_line(tmp_path: Path) -> None:
    """Fails if a metric is not stored under its name, with its step."""
    engine_of(tmp_path).fit(DATA, until="4 steps", eval_data=DATA, eval_every="4 steps")
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert {"time", "tokens", "train/total_loss", "train/learning_rate"} <= lines[0].keys()
    assert "val/loss" in lines[2]
    assert "train/total_loss" not in lines[2]
    assert lines[0]["tokens"] == 4


@pytest.mark.parametrize(
    ("file", "place"), [("other.jsonl", "run/other.jsonl"), ("~/all.jsonl", "home/all.jsonl")]
)
def test_the_summary_names_the_file_that_was_written(
    file: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the summary names a file that does not exist."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = nn.Linear(2, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, b: m(b).square().mean(),
        plugins=[JsonlPlugin(file=file)],
        out=tmp_path / "run",
    )
    engine.fit(DATA, until="1 steps")
    (answer,) = engine.hook.summarize(engine=engine)
    assert Path(answer["metrics"]) == tmp_path / place
    assert Path(answer["metrics"]).exists()


def test_a_line_is_in_the_file_while_the_run_goes_on(tmp_path: Path) -> None:
    """Fails if a killed process loses its last lines."""
    engine = engine_of(tmp_path, log_every=1)
    for state in engine.steps(DATA, until="3 steps"):
        assert len(lines_of(tmp_path)) == state.step


@pytest.mark.parametrize("debris", ["", '{"step": 7, "ti', '{"step": 5}\nnot json\n', "\x00\x00"])
def test_after_a_crash_each_step_is_there_once(tmp_path: Path, debris: str) -> None:
    """Fails if resuming repeats or loses lines, or fails on a torn one."""
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    engine_of(whole).fit(DATA, until="10 steps", eval_data=DATA, eval_every="4 steps")

    first = engine_of(crashed)
    for state in first.steps(DATA, until="10 steps", eval_data=DATA, eval_every="4 steps"):
        if state.step == 4:
            snapshot = first.state_dict()
            snapshot["model"] = {k: v.clone() for k, v in snapshot["model"].items()}
        if state.step == 7:
            break
    with (crashed / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(debris)
    second = engine_of(crashed)
    second.load_state_dict(snapshot)
    second.fit(DATA, until="10 steps", eval_data=DATA, eval_every="4 steps")

    assert without_time(lines_of(crashed)) == without_time(lines_of(whole))


def test_resuming_at_the_end_repeats_nothing(tmp_path: Path) -> None:
    """Fails if a session without training writes the final log again."""
    engine = engine_of(tmp_path, log_every=3)
    snapshots = []
    for state in engine.steps(DATA, until="4 steps", eval_data=DATA):
        if state.step == 4:
            snapshots.append(engine.state_dict())
    before = lines_of(tmp_path)
    again = engine_of(tmp_path, log_every=3)
    again.load_state_dict(snapshots[0])
    again.fit(DATA, until="4 steps", eval_data=DATA)
    assert without_time(lines_of(tmp_path)) == without_time(before)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Fails if a diverged run leaves a file that strict JSON readers reject."""
    engine_of(tmp_path, scale=float("nan")).fit(DATA, until="2 steps")
    assert lines_of(tmp_path)[0]["train/total_loss"] is None


def test_a_new_run_in_an_old_folder_starts_a_new_file(tmp_path: Path) -> None:
    """Fails if the curves of two runs are mixed in one file."""
    engine_of(tmp_path).fit(DATA, until="6 steps")
    engine_of(tmp_path).fit(DATA, until="4 steps")
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]


def test_going_on_in_the_same_process_appends(tmp_path: Path) -> None:
    """Fails if a second `fit` of an engine removes the lines of the first."""
    engine = engine_of(tmp_path)
    engine.fit(DATA, until="4 steps")
    engine.fit(DATA, until="8 steps")
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 6, 8]


def test_without_a_folder_the_run_does_not_start() -> None:
    """Fails if metrics are silently lost because `out` is missing."""
    engine = engine_of(None)
    with pytest.raises(ConfigError, match=r"jsonl writes to the output folder.*out="):
        engine.fit(DATA, until="1 step")
    assert engine.state.step == 0


class TalkativePlugin(Plugin[PluginConfig]):
    """Writes two notes before the update of a step, and a note and an image after it."""

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        for word in ("one", "two"):
            text = f"{word} before {engine.state.step + 1}"
            engine.hook.on_note(engine=engine, title="talk", text=text)

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        engine.note("talk", f"after {engine.state.step}")
        shown = torch.full((2, 3), engine.state.step, dtype=torch.uint8)
        engine.note("shown/it is", image=shown)


def test_a_note_is_a_line_with_its_step_and_none_is_lost_or_doubled(tmp_path: Path) -> None:
    """Fails if notes are not stored, or a killed and resumed run has other lines."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    engine_of(whole, plugins=[TalkativePlugin()]).fit(DATA, until="6 steps")
    first = engine_of(killed, plugins=[TalkativePlugin()])
    for state in first.steps(DATA, until="6 steps"):
        if state.step == 3:
            snapshot = copy.deepcopy(first.state_dict())
        if state.step == 5:
            break
    second = engine_of(killed, plugins=[TalkativePlugin()])
    second.load_state_dict(snapshot)
    second.fit(DATA, until="6 steps")
    lines = lines_of(whole)
    assert without_time(lines_of(killed)) == without_time(lines)
    images = [line for line in lines if "image" in line]
    assert [line["step"] for line in images] == [1, 2, 3, 4, 5, 6]
    for out in (whole, killed):
        assert sorted((out / "images").iterdir()) == [out / line["image"] for line in images]
        for line in images:
            assert np.unique(PIL.Image.open(out / line["image"])).tolist() == [line["step"]]
    notes = [line for line in lines if "note" in line and "image" not in line]
    assert [(line["step"], line["text"]) for line in notes] == [
        (step - (word != "after"), f"{word} {step}")
        for step in range(1, 7)
        for word in ("one before", "two before", "after")
    ]
    assert notes[0].keys() == {"step", "time", "tokens", "note", "text"}
    assert {line["note"] for line in notes} == {"talk"}


def test_a_new_run_in_an_old_folder_removes_its_images_and_nothing_else(tmp_path: Path) -> None:
    """Fails if images of two runs are mixed, or a line causes another file to be removed."""
    engine_of(tmp_path, plugins=[TalkativePlugin()]).fit(DATA, until="3 steps")
    own = tmp_path / "images" / "mine.png"
    own.touch()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for name in ("images/mine.png", "images/../metrics.jsonl", "../run.png"):
            file.write(json.dumps({"step": 9, "image": name}) + "\n")
    engine_of(tmp_path).fit(DATA, until="2 steps")
    assert list((tmp_path / "images").iterdir()) == [own]


def test_a_note_from_before_the_first_step_outlives_a_resumption(tmp_path: Path) -> None:
    """Fails if notes at step 0 are mistaken for those of another run."""
    engine = engine_of(tmp_path)
    engine.hook.on_start(engine=engine)
    engine.hook.on_note(engine=engine, title="talk", text="at once")
    engine.hook.on_close(engine=engine)
    snapshot = copy.deepcopy(engine.state_dict())
    snapshot["train"]["step"] = 2
    again = engine_of(tmp_path)
    again.load_state_dict(snapshot)
    again.fit(DATA, until="4 steps")
    assert [(line["step"], line.get("text")) for line in lines_of(tmp_path)] == [
        (0, "at once"),
        (4, None),
    ]
