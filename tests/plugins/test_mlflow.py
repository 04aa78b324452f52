"""MLflow with a local database, read back with its own client."""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins_contrib.mlflow import MlflowPlugin
from tiny import RecorderPlugin, Regression, tiny_engine, weights


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server in the environment, and no telemetry."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def out(tmp_path: Path, empty_store: Path) -> Path:
    """A run folder with an empty store."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def data() -> list[dict[str, torch.Tensor]]:
    rows = Regression()
    return [{"x": rows.x[i : i + 4], "y": rows.y[i : i + 4]} for i in range(0, 20, 4)]


def engine_of(out: Path, *plugins: Plugin[Any], **options: Any) -> Engine:
    return tiny_engine(*plugins, out=out, log_every=1, **options)


def client_of(out: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")


def runs_of(out: Path, experiment: str = "nexus") -> list[Run]:
    client = client_of(out)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def points(out: Path, run: Run) -> list[tuple[int, str, float]]:
    """Every value that was stored: step, name, value."""
    client = client_of(out)
    return sorted(
        (point.step, name, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )


def recorded(*recorders: RecorderPlugin) -> list[tuple[int, str, float]]:
    """What the engine logged, in the same shape."""
    lines = [line for recorder in recorders for line in recorder.lines]
    return sorted({(step, name, v) for step, metrics in lines for name, v in metrics.items()})


@pytest.mark.slow
def test_every_metric_and_the_config_can_be_read_back(out: Path) -> None:
    """Fails if a metric, its step, a parameter, a tag or the name is not stored."""
    recorder = RecorderPlugin()
    plugin = MlflowPlugin(experiment="e", run_name="n", tags={"team": "red"})
    config = {"seed": 5, "plugins": {"clip": {"max_norm": 0.5}}, "long": "x" * 7000}
    config |= {f"key{number}": number for number in range(250)}
    engine = engine_of(out, plugin, recorder, config=config)
    engine.fit(data(), until="4 steps", eval_data=data(), eval_every="2 steps")
    (run,) = runs_of(out, "e")
    assert points(out, run) == recorded(recorder)
    assert run.data.params["plugins.clip.max_norm"] == "0.5"
    assert run.data.params["key249"] == "249"
    assert run.data.params["long"] == "x" * 6000
    assert run.data.tags["team"] == "red"
    assert (run.info.run_name, run.info.status) == ("n", "FINISHED")
    (answer,) = engine.hook.summarize(engine=engine)
    assert run.info.run_id in answer["mlflow"]


@pytest.mark.slow
@pytest.mark.parametrize("by_id", [False, True], ids=["by checkpoint", "by id"])
def test_a_resumed_run_goes_on_in_the_same_run_without_doubles(out: Path, by_id: bool) -> None:
    """Fails if resuming creates a second run, or points are duplicated or missing."""
    one, other = RecorderPlugin(), RecorderPlugin()
    first = engine_of(out, MlflowPlugin(), one, config={"seed": 5})
    for state in first.steps(data(), until="6 steps"):
        if state.step == 2:
            snapshot = first.state_dict()
            snapshot["model"] = {k: v.clone() for k, v in snapshot["model"].items()}
        if state.step == 4:
            break
    (run,) = runs_of(out)
    assert run.info.status == "KILLED"
    if by_id:
        snapshot["plugins"].pop("mlflow")
    given = {"run_id": run.info.run_id} if by_id else {}
    second = engine_of(out, MlflowPlugin(**given), other, config={"seed": 6, "new": 1})
    second.load_state_dict(snapshot)
    second.fit(data(), until="6 steps", eval_data=data())
    (run,) = runs_of(out)
    found = points(out, run)
    assert len({(step, name) for step, name, _ in found}) == len(found), "nothing twice"
    assert {(step, name) for step, name, _ in found} == {
        (step, name) for step, name, _ in recorded(one, other)
    }
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "5", "new": "1"}, "parameters cannot change in MLflow"


@pytest.mark.slow
def test_the_final_checkpoint_is_stored_on_request(out: Path) -> None:
    """Fails if the artifact is missing, or uploaded before the checkpoint is complete."""
    plugins = (CheckpointPlugin(), MlflowPlugin(artifact=True))
    engine_of(out, *plugins).fit(data(), until="2 steps")
    (run,) = runs_of(out)
    stored = client_of(out).list_artifacts(run.info.run_id, "final")
    assert "final/model.safetensors" in {entry.path for entry in stored}
    assert run.info.artifact_uri.startswith(out.as_uri())


@pytest.mark.slow
def test_a_run_that_fails_is_shown_as_failed(out: Path) -> None:
    """Fails if a crashed run looks finished."""
    batches = data()
    batches[2] = {}
    with pytest.raises(KeyError):
        engine_of(out, MlflowPlugin()).fit(batches, until="4 steps")
    assert [run.info.status for run in runs_of(out)] == ["FAILED"]


@pytest.mark.slow
def test_an_exception_of_the_package_changes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a failing database stops training or goes unnoticed."""

    def log_batch(*_: object, **__: object) -> None:
        raise OSError("planted")

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    engine = engine_of(out, MlflowPlugin())
    with pytest.warns(RuntimeWarning, match="logger 'mlflow' failed to write.*planted"):
        engine.fit(data(), until="2 steps")
    plain = tiny_engine(log_every=1)
    plain.fit(data(), until="2 steps")
    assert all(torch.equal(*pair) for pair in zip(weights(engine), weights(plain), strict=True))
    (answer,) = engine.hook.summarize(engine=engine)
    assert "failed 2 times" in answer["logger mlflow"]


@pytest.mark.slow
def test_a_metric_of_any_name_is_stored_under_one_that_mlflow_takes(out: Path) -> None:
    """Fails if one odd name switches the logger off, or two names become one."""

    class OddPlugin(Plugin[PluginConfig]):
        """Logs metrics with odd names."""

        before = ("mlflow",)

        @hookimpl
        def on_log(self, metrics: dict[str, float]) -> None:
            metrics |= {
                "acc@1": 1.0,
                "acc_1": 2.0,
                "a//b": 3.0,
                "../x": 4.0,
                "é": 5.0,
                "n" * 300: 6.0,
            }
            metrics |= {f"many/{number}": 0.0 for number in range(1100)}

    config = {"plugins": {"x": {"a@b": 1}}}
    for _ in range(2):  # the second time, resumed
        engine = engine_of(out, MlflowPlugin(), OddPlugin(), config=config)
        if (out / "snapshot").exists():
            engine.load_state_dict(torch.load(out / "snapshot", weights_only=False))
        engine.fit(data(), until="2 steps")
        assert "logger mlflow" not in str(engine.hook.summarize(engine=engine))
        out.mkdir(exist_ok=True)
        torch.save(engine.state_dict(), out / "snapshot")
    (run,) = runs_of(out)
    stored = run.data.metrics
    assert {stored[name] for name in ("acc_1", "acc_1_")} == {1.0, 2.0}
    assert stored["acc_1"] == 2.0
    assert (stored["a/_/b"], stored["_/x"], stored["é"], stored["n" * 250]) == (3.0, 4.0, 5.0, 6.0)
    assert len(client_of(out).get_metric_history(run.info.run_id, "acc_1_")) == 2
    assert run.data.params == {"plugins.x.a_b": "1"}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the message does not say what to install."""
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    monkeypatch.delitem(sys.modules, "nexus_plugins_contrib.mlflow")
    monkeypatch.delitem(sys.modules, "nexus_plugins_contrib.mlflow.plugin")
    with pytest.raises(ConfigError, match=r"pip install 'nexus-trainer\[mlflow\]'"):
        import_module("nexus_plugins_contrib.mlflow")


SILENT_SERVER = """
import sys
from tiny import tiny_engine
from nexus_plugins_contrib.mlflow import MlflowPlugin
address = sys.argv[1]
engine = tiny_engine(MlflowPlugin(tracking_uri=address, timeout=1), out="run", log_every=1)
batch = {"x": __import__("torch").ones(2, 5), "y": __import__("torch").ones(2, 4)}
print(engine.fit([batch] * 5, until="5 steps").status)
print(*engine.hook.summarize(engine=engine))
"""


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_the_run(tmp_path: Path) -> None:
    """Fails if a hung network keeps a run, or its process, from ending."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        path = os.pathsep.join(
            [str(Path(__file__).parents[1] / "core"), os.environ.get("PYTHONPATH", "")]
        )
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", SILENT_SERVER, address]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True,
                              text=True, timeout=120, check=True)  # fmt: skip
    assert done.stdout.startswith("finished\n")
    assert "no answer within 1 s); it was switched off" in done.stdout


@pytest.mark.slow
def test_a_note_is_a_tag_of_the_run_and_an_image_an_artifact(out: Path) -> None:
    """Fails if a note is missing or too long for MLflow, or an image is stored twice."""
    first, engine = engine_of(out, MlflowPlugin()), engine_of(out, MlflowPlugin())
    for one, end in ((first, 2), (engine, 3)):
        for state in one.steps(data(), until="3 steps"):
            one.note("talk/last", f"step {state.step}")
            one.note("shown/it is", "an image", image=torch.eye(3))
            if state.step == 1:
                engine.load_state_dict(copy.deepcopy(first.state_dict()))
            if state.step == 2:
                one.note("talk/long", "x" * 9000)
            if state.step == end:
                break
    (run,) = runs_of(out)
    assert run.data.tags["talk/last"] == "step 3: step 3"
    assert run.data.tags["talk/long"] == ("step 2: " + "x" * 9000)[:8000]
    assert run.data.tags["shown/it is"] == "step 3: an image"
    files = [file.path for file in client_of(out).list_artifacts(run.info.run_id, "images")]
    stored = sorted(file for file in files if file.endswith(".png"))
    assert [file.split("+")[:3] for file in stored] == [
        ["images/shown~it is", "step", str(step)] for step in (1, 2, 3)
    ]
    image = PIL.Image.open(client_of(out).download_artifacts(run.info.run_id, stored[0]))
    assert (np.asarray(image.convert("L")) == np.eye(3) * 255).all()
    (answer,) = engine.hook.summarize(engine=engine)
    assert "logger mlflow" not in answer
