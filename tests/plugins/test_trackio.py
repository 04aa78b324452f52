"""Trackio with its local store, read back with its own command and store."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import trackio
from trackio.sqlite_storage import SQLiteStorage

from nexus_core import ConfigError, Engine, Plugin
from nexus_plugins_contrib.trackio import TrackioPlugin
from tiny import RecorderPlugin, Regression, tiny_engine, weights


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store for this test; Trackio reads its path at import."""
    folder = tmp_path / "trackio"
    folder.mkdir()
    for name, module in list(sys.modules.items()):
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
        if name.startswith("trackio") and hasattr(module, "MEDIA_DIR"):
            monkeypatch.setattr(module, "MEDIA_DIR", folder / "media")
    return folder


def data() -> list[dict[str, torch.Tensor]]:
    rows = Regression()
    return [{"x": rows.x[i : i + 4], "y": rows.y[i : i + 4]} for i in range(0, 20, 4)]


def engine_of(*plugins: Plugin[Any], **options: Any) -> Engine:
    return tiny_engine(*plugins, log_every=1, **options)


def points(project: str = "nexus") -> list[tuple[int, str, float]]:
    """Every value of the project's only run: step, name, value."""
    (run,) = trackio.Api().runs(project)
    return sorted(
        (line["step"], name, value)
        for line in SQLiteStorage.get_logs(project, run.name, run_id=run.id)
        for name, value in line.items()
        if name not in ("step", "timestamp")
    )


def recorded(*recorders: RecorderPlugin) -> list[tuple[int, str, float]]:
    """What the engine logged, in the same shape."""
    lines = [line for recorder in recorders for line in recorder.lines]
    return sorted({(step, name, v) for step, metrics in lines for name, v in metrics.items()})


def test_every_metric_and_the_config_can_be_read_back() -> None:
    """Fails if a metric, its step, the config or the name is not stored."""
    recorder = RecorderPlugin()
    config = {"seed": 5, "plugins": {"clip": {"max_norm": 0.5}}}
    plugin = TrackioPlugin(project="p", run_name="n", group="g")
    engine = engine_of(plugin, recorder, config=config)
    engine.fit(data(), until="4 steps", eval_data=data(), eval_every="2 steps")
    assert points("p") == recorded(recorder)
    (run,) = trackio.Api().runs("p")
    assert run.name == "n"
    assert run.config is not None
    assert run.config["plugins"] == {"clip": {"max_norm": 0.5}}
    assert run.config["_Group"] == "g"
    (answer,) = engine.hook.summarize(engine=engine)
    assert answer == {"trackio": "trackio show --project p, run n"}


@pytest.mark.slow
def test_its_own_command_shows_the_run(store: Path) -> None:
    """Fails if Trackio's tools do not find what was stored."""
    engine_of(TrackioPlugin(run_name="n")).fit(data(), until="3 steps")
    command = [sys.executable, "-m", "trackio.cli", "list", "runs", "--project", "nexus", "--json"]
    environment = {**os.environ, "TRACKIO_DIR": str(store)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["runs"] == ["n"]


def test_a_resumed_run_goes_on_in_the_same_run_without_doubles() -> None:
    """Fails if resuming creates a second run, or points are duplicated or missing."""
    one, other = RecorderPlugin(), RecorderPlugin()
    first = engine_of(TrackioPlugin(), one)
    for state in first.steps(data(), until="6 steps"):
        if state.step == 2:
            snapshot = first.state_dict()
            snapshot["model"] = {k: v.clone() for k, v in snapshot["model"].items()}
        if state.step == 4:
            break
    second = engine_of(TrackioPlugin(), other)
    second.load_state_dict(snapshot)
    second.fit(data(), until="6 steps", eval_data=data())
    found = points()
    assert len({(step, name) for step, name, _ in found}) == len(found), "nothing twice"
    assert {(step, name) for step, name, _ in found} == {
        (step, name) for step, name, _ in recorded(one, other)
    }


def test_words_and_images_are_kept_with_their_step_and_once(store: Path) -> None:
    """Fails if a note does not reach Trackio, or is duplicated in a resumed run."""
    first, second = engine_of(TrackioPlugin()), engine_of(TrackioPlugin())
    for engine, end in ((first, 3), (second, 4)):
        for state in engine.steps(data(), until="6 steps"):
            engine.note("talk", f"step {state.step}\nis done")
            engine.note("shown", "an image", image=torch.eye(3))
            if state.step == 2:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            if state.step == end:
                break
    notes = [(step, value) for step, name, value in points() if name == "talk/text"]
    assert notes == [
        (step, {"_type": "trackio.markdown", "_value": f"step {step}\n\nis done"})
        for step in (1, 2, 3, 4)
    ]
    images = [(step, value) for step, name, value in points() if name == "shown/image"]
    assert [(step, value["caption"]) for step, value in images] == [
        (step, "an image") for step in (1, 2, 3, 4)
    ]
    image = PIL.Image.open(store / "media" / images[0][1]["file_path"])
    assert (np.asarray(image.convert("L")) == np.eye(3) * 255).all()


def test_two_runs_without_a_name_are_two() -> None:
    """Fails if the curves of two runs are mixed in one."""
    for _ in range(2):
        engine_of(TrackioPlugin()).fit(data(), until="2 steps")
    assert len({run.name for run in trackio.Api().runs("nexus")}) == 2


def test_an_exception_of_the_package_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a failing package stops training or goes unnoticed."""

    def init(**_: object) -> None:
        raise OSError("planted")

    monkeypatch.setattr(trackio, "init", init)
    engine = engine_of(TrackioPlugin())
    with pytest.warns(RuntimeWarning, match="'trackio' failed to open at step 0.*planted"):
        engine.fit(data(), until="2 steps")
    plain = tiny_engine(log_every=1)
    plain.fit(data(), until="2 steps")
    assert all(torch.equal(*pair) for pair in zip(weights(engine), weights(plain), strict=True))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the message does not say what to install."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.delitem(sys.modules, "nexus_plugins_contrib.trackio")
    with pytest.raises(ConfigError, match=r"pip install 'nexus-trainer\[trackio\]'"):
        import_module("nexus_plugins_contrib.trackio")
