"""Weights & Biases, offline, read back with wandb's own reader."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import wandb
from click.testing import CliRunner

from nexus_core import ConfigError, Engine, Plugin
from nexus_core.cli.run import main as nexus_run
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins_contrib.wandb import WandbPlugin
from nexus_plugins_contrib.wandb.plugin import _has_credentials
from tiny import RecorderPlugin, Regression, tiny_engine, weights


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an account, and no telemetry."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def data() -> list[dict[str, torch.Tensor]]:
    rows = Regression()
    return [{"x": rows.x[i : i + 4], "y": rows.y[i : i + 4]} for i in range(0, 20, 4)]


def engine_of(out: Path, *plugins: Plugin[Any], **options: Any) -> Engine:
    return tiny_engine(*plugins, out=out, log_every=1, **options)


def read(out: Path) -> list[dict[str, Any]]:
    """Every record of every session of the runs in a folder."""
    records = []
    for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        records += [json.loads(line) for line in done.stdout.splitlines()]
    return records


def points(records: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """Every logged value: step, name, value; for text and images the file's path."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return sorted(
        (item["_step"], name.removesuffix(".path"), value)
        for item in items
        for name, value in item.items()
        if not name.startswith("_")
        and (f"{name.partition('.')[0]}._type" not in item or name.endswith(".path"))
    )


def recorded(*recorders: RecorderPlugin) -> list[tuple[int, str, float]]:
    """What the engine logged, in the same shape."""
    lines = [line for recorder in recorders for line in recorder.lines]
    return sorted({(step, name, v) for step, metrics in lines for name, v in metrics.items()})


def run_script(
    folder: Path, script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A separate process with access to the tests' helpers, with its own wandb."""
    helpers = str(Path(__file__).parents[1] / "core")
    path = os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**inherited, "PYTHONPATH": path, **environment},
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def runs_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["run"] for record in records if record["type"] == "run"]


@pytest.mark.slow
def test_every_metric_and_the_config_can_be_read_back(tmp_path: Path) -> None:
    """Fails if a metric, its step, the config or a name does not get into wandb's file."""
    recorder = RecorderPlugin()
    settings = {"project": "p", "run_name": "n", "tags": ("a", "b")}
    config = {"seed": 5, "plugins": {"clip": {"max_norm": 0.5}}}
    engine = engine_of(tmp_path, WandbPlugin(**settings), recorder, config=config)
    for state in engine.steps(data(), until="4 steps", eval_data=data(), eval_every="2 steps"):
        if state.step == 3:
            engine.note("talk", "3 < 4 & so on")
            engine.note("shown", "an image", image=torch.eye(3))
    records = read(tmp_path)
    (run,) = runs_of(records)
    notes = {name: value for _, name, value in points(records) if isinstance(value, str)}
    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    image = PIL.Image.open(files / notes["shown/image"])
    assert (np.asarray(image.convert("L")) == np.eye(3) * 255).all()
    assert "3 &lt; 4 &amp; so on" in (files / notes["talk/text"]).read_text()
    assert '"an image"' in json.dumps(records)
    assert (run["project"], run["display_name"], run["tags"]) == ("p", "n", ["a", "b"])
    assert run["config"]["update"]["plugins"] == {"clip": {"max_norm": 0.5}}
    numbers = [point for point in points(records) if point[1] not in notes]
    assert numbers == recorded(recorder)
    assert sorted({step for step, _, _ in points(records)}) == [1, 2, 3, 4]
    (answer,) = engine.hook.summarize(engine=engine)
    assert answer["wandb"].startswith(f"wandb sync {tmp_path}/wandb/offline-run-")


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_run_without_doubles(tmp_path: Path) -> None:
    """Fails if resuming creates a second run, or lines are duplicated or missing."""
    one, other = RecorderPlugin(), RecorderPlugin()
    first = engine_of(tmp_path, WandbPlugin(), one)
    for state in first.steps(data(), until="6 steps"):
        first.note("talk", "so")
        first.note("shown", image=torch.eye(3))
        if state.step == 2:
            snapshot = first.state_dict()
            snapshot["model"] = {k: v.clone() for k, v in snapshot["model"].items()}
        if state.step == 4:
            break
    second = engine_of(tmp_path, WandbPlugin(), other)
    second.load_state_dict(snapshot)
    for _ in second.steps(data(), until="6 steps", eval_data=data()):
        second.note("talk", "so")
        second.note("shown", image=torch.eye(3))
    records = read(tmp_path)
    assert len({run["run_id"] for run in runs_of(records)}) == 1
    found = points(records)
    assert len({(step, name) for step, name, _ in found}) == len(found), "nothing twice"
    said = {(step, name) for step in range(1, 7) for name in ("talk/text", "shown/image")}
    assert {(step, name) for step, name, _ in found} - said == {
        (step, name) for step, name, _ in recorded(one, other)
    }
    assert said <= {(step, name) for step, name, _ in found}


KILLED = """
import os, signal, sys, time
import torch
from nexus_core import Plugin, PluginConfig, hookimpl
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins_contrib.wandb import WandbPlugin
from tiny import tiny_engine

class KillPlugin(Plugin[PluginConfig]):
    after = ("checkpoint",)

    @hookimpl
    def on_log(self, engine):
        engine.note("talk", "so")
        engine.note("shown", image=torch.eye(3))

    @hookimpl
    def on_step_end(self, engine):
        if engine.state.step == int(sys.argv[1]):
            while wandb_plugin.state_dict()["waiting"]:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

wandb_plugin = WandbPlugin(mode="offline")
checkpoint = CheckpointPlugin(every="2 steps")
engine = tiny_engine(wandb_plugin, checkpoint, KillPlugin(), out="run", log_every=1)
engine.resume("auto")
batch = {"x": torch.ones(2, 5), "y": torch.ones(2, 4)}
engine.fit([batch] * 7, until="7 steps", eval_data=[batch], eval_every="3 steps")
"""


@pytest.mark.slow
def test_a_killed_run_misses_no_line_and_has_none_twice(tmp_path: Path) -> None:
    """Fails if data buffered in wandb's process is lost with it.

    The first session is killed after a checkpoint, the second before it has stored what it took
    over from the first, the third ends normally.
    """
    for killed_at in ("5", "6", "0"):
        done = run_script(tmp_path, KILLED, killed_at)
        assert done.returncode == (0 if killed_at == "0" else -signal.SIGKILL), done.stderr
    found = points(read(tmp_path / "run"))
    for kind in ("train/total_loss", "talk/text", "shown/image"):
        assert [step for step, name, _ in found if name == kind] == [1, 2, 3, 4, 5, 6, 7], kind
    assert [step for step, name, _ in found if name == "val/total_loss"] == [3, 6, 7]


class Server:
    """A fake online run of wandb whose server has the steps before `starting_step`."""

    id, url, dir, offline = "abc", "https://wandb", "files", False

    def __init__(self, starting_step: int) -> None:
        self.starting_step = starting_step
        self.lines: list[tuple[int, set[str]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append((step, set(metrics)))

    def finish(self, exit_code: int) -> None:
        assert exit_code == 0


def test_online_what_the_server_has_not_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a line not uploaded before a kill is lost, or all lines are uploaded again."""
    (tmp_path / "wandb").mkdir()
    first, second = Server(0), Server(3)
    monkeypatch.setattr(wandb, "init", lambda **given: first)
    engine = engine_of(tmp_path, WandbPlugin(mode="online"))
    for state in engine.steps(data(), until="6 steps"):
        if state.step == 4:
            break
    snapshot = engine.state_dict()
    with (tmp_path / "wandb" / "lines-abc.jsonl").open("a") as file:
        file.write('\n[4, {"train/lo')  # the disk was full
    monkeypatch.setattr(wandb, "init", lambda **given: second)
    engine = engine_of(tmp_path, WandbPlugin(mode="online"))
    engine.load_state_dict(snapshot)
    engine.fit(data(), until="6 steps")
    assert [step for step, _ in first.lines] == [1, 2, 3, 4]
    assert [step for step, _ in second.lines] == [3, 4, 5, 6]
    assert {frozenset(names) for _, names in first.lines + second.lines} == {
        frozenset(first.lines[0][1])
    }


@pytest.mark.slow
def test_the_final_checkpoint_is_stored_on_request(tmp_path: Path) -> None:
    """Fails if the artifact is missing, or uploaded before the checkpoint is complete."""
    engine = engine_of(tmp_path, CheckpointPlugin(), WandbPlugin(artifact=True))
    engine.fit(data(), until="2 steps")
    (artifact,) = [r["artifact"] for r in read(tmp_path) if r["type"] == "artifact"]
    assert "final" in artifact["aliases"]
    files = {entry["path"]: entry["local_path"] for entry in artifact["manifest"]["contents"]}
    assert {"model.safetensors", "manifest.json"} <= files.keys()
    assert all(path.startswith(str(tmp_path / "checkpoints")) for path in files.values())


@pytest.mark.parametrize(
    ("settings", "environment", "netrc", "mode"),
    [
        ({}, {}, "", "offline"),
        ({}, {"WANDB_API_KEY": "k" * 40}, "", "online"),
        ({}, {}, "machine api.wandb.ai login user password secret", "online"),
        ({}, {"WANDB_BASE_URL": "https://own.org"}, "machine own.org login u password s", "online"),
        ({}, {"WANDB_BASE_URL": "https://own.org"}, "machine api.wandb.ai login u password s",
         "offline"),
        ({}, {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ({"mode": "offline"}, {"WANDB_API_KEY": "k" * 40}, "", "offline"),
        ({"mode": "online"}, {}, "", "online"),
        ({}, {"WANDB_MODE": "dryrun", "WANDB_API_KEY": "k" * 40}, "", "offline"),
        ({}, {"WANDB_MODE": "run"}, "", "online"),
        ({"mode": "offline"}, {"WANDB_DISABLED": "true"}, "", "offline"),
    ],
)  # fmt: skip
def test_online_only_where_there_are_credentials(
    settings: dict[str, Any],
    environment: dict[str, str],
    netrc: str,
    mode: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a run without an account asks for one, or one with an account stays offline.

    The failing `init` also shows that an exception in the package does not affect training.
    """
    asked: list[str | None] = []

    def init(**given: Any) -> None:
        asked.append(given["mode"])
        raise ConnectionError("planted")

    monkeypatch.setattr(wandb, "init", init)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    engine = engine_of(tmp_path, WandbPlugin(**settings))
    with pytest.warns(RuntimeWarning, match="'wandb' failed to open at step 0.*planted.*off"):
        engine.fit(data(), until="3 steps")
    assert asked == [mode]
    plain = tiny_engine(log_every=1)
    plain.fit(data(), until="3 steps")
    assert all(torch.equal(*pair) for pair in zip(weights(engine), weights(plain), strict=True))


@pytest.mark.parametrize(
    "environment", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}, {"WANDB_DISABLED": "1"}]
)
def test_disabled_by_the_environment_it_does_nothing_and_says_so(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine = engine_of(tmp_path, WandbPlugin())
    engine.fit(data(), until="3 steps", eval_data=data())
    assert not (tmp_path / "wandb").exists()
    assert engine.hook.summarize(engine=engine) == [
        {"wandb": "disabled by the environment (WANDB_MODE or WANDB_DISABLED)"}
    ]


def test_a_mode_that_there_is_not_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "garbage")
    with pytest.raises(ConfigError, match="WANDB_MODE is 'garbage'; expected one of dryrun, run,"):
        engine_of(tmp_path, WandbPlugin()).fit(data(), until="3 steps")


def test_without_a_home_folder_it_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NETRC")
    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert not _has_credentials()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the message does not say what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "nexus_plugins_contrib.wandb.plugin")
    with pytest.raises(ConfigError, match=r"pip install 'nexus-trainer\[wandb\]'"):
        import_module("nexus_plugins_contrib.wandb.plugin")


@pytest.mark.slow
def test_the_command_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if `--plugins amp,curriculum,wandb` needs an account, a network or user input."""
    monkeypatch.chdir(tmp_path)
    small = ["-s", "until=3 steps", "-s", "lr_cosine.warmup=1 steps", "-s", "log_every=1",
             "-s", "data_text.batch_size=2", "-s", "data_text.valid_limit=2048"]  # fmt: skip
    result = CliRunner().invoke(nexus_run, ["-p", "amp,curriculum,wandb", *small, "--out", "o"])
    assert result.exit_code == 0, result.output
    assert "wandb sync" in result.output
    records = read(tmp_path / "o")
    lines = [json.loads(line) for line in Path("o/metrics.jsonl").read_text().splitlines()]
    names = Counter((line["step"], k) for line in lines for k in line.keys() - {"time", "step"})
    assert {(s, n) for s, n, _ in points(records)} == {key for key in names if key[1] != "tokens"}
    assert runs_of(records)[0]["config"]["update"]["plugins"]["amp"]


SILENT_SERVER = """
from tiny import tiny_engine
from nexus_plugins_contrib.wandb import WandbPlugin
engine = tiny_engine(WandbPlugin(mode="online", timeout=1), out="run", log_every=1)
batch = {"x": __import__("torch").ones(2, 5), "y": __import__("torch").ones(2, 4)}
print(engine.fit([batch] * 5, until="5 steps").status)
print(*engine.hook.summarize(engine=engine))
"""


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_the_run(tmp_path: Path) -> None:
    """Fails if a hung network keeps a run, or its process, from ending."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "k" * 40}
        done = run_script(tmp_path, SILENT_SERVER, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("finished\n")
    assert "no answer within 1 s); it was switched off" in done.stdout
