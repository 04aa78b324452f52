"""What a user of `nexus-run` sees: output, exit codes, files; and what never happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from nexus_core import DataError
from nexus_core.cli import session
from nexus_core.cli.plugins import main as nexus_plugins
from nexus_core.cli.run import main as nexus_run
from tiny import tiny_engine


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own that holds a small corpus and a config over it."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    Path("empty.txt").write_text("")
    config: dict[str, Any] = {
        "until": "6 steps",
        "seed": 1,
        "log_every": "2 steps",
        "plugins": {
            "data_text": {"train": "corpus.txt", "seq_len": 32, "batch_size": 4},
            "model_nexus": {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16, "dropout": 0.1},
            "loss_lm": {},
            "optim_adamw": {"lr": 1e-3},
            "lr_cosine": {"warmup": "2 steps"},
            "clip": {},
            "checkpoint": {"every": "2 steps"},
            "jsonl": {},
        },
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_run, arguments)


def weights(out: str, checkpoint: str = "step-00000006") -> bytes:
    return (Path(out) / "checkpoints" / checkpoint / "model.safetensors").read_bytes()


def test_run_leaves_config_log_checkpoint_and_summary_and_config_repeats_it() -> None:
    result = run("tiny.yaml", "--out", "one")
    assert result.exit_code == 0, result.output
    assert "val/loss" in result.output
    for label in ("checkpoints", "metrics", "bigram, same text", "sample"):
        assert f"\n  {label} " in result.output, "plugins' answers to `summarize` are printed"
    summary = json.loads(Path("one/summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert summary["tokens"] == 6 * 4 * 32
    assert summary["metrics"]["val/bits_per_byte"] > 0
    lines = [json.loads(line) for line in Path("one/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/total_loss" in line] == [2, 4, 6]
    again = run("one/config.yaml", "--out", "two", "--quiet", "-p", "console")
    assert again.exit_code == 0, again.output
    assert len(again.output.splitlines()) == 1
    assert weights("one") == weights("two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.yaml", "-p", "clipp"], "no plugin named 'clipp'. Did you mean 'clip'"),
        (["tiny.yaml", "-s", "clip.max_nrom=1"], "unknown key 'clip.max_nrom'. Did you mean"),
        (["tiny.yaml", "-s", "clip.max_norm=big"], "clip.max_norm: got 'big'"),
        (["tiny.yaml", "-s", "data_text.train=absent.txt"], "absent.txt"),
        (["tiny.yaml", "-s", "data_text.train=empty.txt"], "empty.txt"),
        (["no_such_preset"], "no preset or config file named 'no_such_preset'"),
        (["tiny.yaml", "-p", "lr_linear"], "both fill the slot 'lr'"),
        (["tiny.yaml", "-s", "lr_cosine.warmup=9 steps"], "lr_cosine.warmup is 9 steps"),
        (["tiny.yaml", "-s", "device=toaster"], "cannot use the device 'toaster'"),
        (["tiny.yaml", "--resume", "nowhere"], "nowhere"),
        (["tiny.yaml", "-p", "no:loss_lm"], "there is no loss"),
        (["tiny.yaml", "-p", "no:optim_adamw"], "there is no optimizer"),
    ],
)
def test_users_mistake_is_one_message_exit_2_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("error:") == 1
    assert "Traceback" not in result.output
    assert sorted(folder.rglob("*")) == before, "no run folder is left behind"


def test_folder_with_a_run_is_not_written_over() -> None:
    assert run("tiny.yaml", "--out", "one", "-s", "until=2 steps").exit_code == 0
    log = Path("one/metrics.jsonl").read_bytes()
    result = run("tiny.yaml", "--out", "one")
    assert result.exit_code == 2
    assert "holds a run already" in result.output
    assert Path("one/metrics.jsonl").read_bytes() == log


def test_a_mistake_takes_nothing_away_from_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a run that ends at once removes what another has written beside it meanwhile."""

    def neighbour(*_: object) -> None:
        Path("runs/other/checkpoints").mkdir(parents=True)
        raise DataError("planted")

    monkeypatch.setattr(session, "_fit", neighbour)
    assert run("tiny.yaml").exit_code == 2
    assert [path.name for path in Path("runs").iterdir()] == ["other"]
    assert Path("runs/other/checkpoints").exists()


@pytest.mark.parametrize("name", ["2025-01-31", "42", "#5", "null", "a: b"])
def test_a_folder_may_have_any_name(name: str) -> None:
    assert (
        run("tiny.yaml", "--out", name, "-s", "until=1 steps", "-p", "no:lr_cosine").exit_code == 0
    )
    assert Path(name, "summary.json").exists()


@pytest.mark.filterwarnings("ignore:resuming. until is")
def test_auto_finds_the_runs_of_this_very_config() -> None:
    """Red if `my` goes on with the checkpoints of `my-big`."""
    for folder in ("tiny-20250101-000000", "tiny-big-20260101-000000"):
        assert run("tiny.yaml", "--out", f"runs/{folder}", "-s", "until=4").exit_code == 0
    resumed = run("tiny.yaml", "--resume", "auto", "-s", "until=5")
    assert "resumed at step 4" in resumed.output
    assert "in runs/tiny-20250101-000000" in resumed.output


@pytest.mark.filterwarnings("ignore:resuming. until is")
def test_run_that_is_extended_ends_like_one_that_was_not_stopped() -> None:
    """A constant rate, so that the horizon does not matter: 4 steps and then 2 are 6."""
    constant = ["-p", "no:lr_cosine"]
    assert run("tiny.yaml", "--out", "whole", *constant).exit_code == 0
    assert run("tiny.yaml", "--out", "parts", *constant, "-s", "until=4 steps").exit_code == 0
    result = run("tiny.yaml", "--out", "parts", *constant, "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert "resumed at step 4" in result.output
    assert weights("whole") == weights("parts")


@pytest.mark.parametrize("more", ["", "pcgrad,loss_reason", "weigh_gradnorm,loss_reason"])
def test_dry_run_reports_and_writes_nothing(folder: Path, more: str) -> None:
    before = sorted(folder.rglob("*"))
    result = run("tiny.yaml", "--dry-run", "-p", more)
    assert result.exit_code == 0, result.output
    assert "tokens a step   128" in result.output
    assert "parameters" in result.output
    assert "val/loss" in result.output
    assert sorted(folder.rglob("*")) == before


def test_explain_shows_the_plan_without_building_anything() -> None:
    result = run("tiny.yaml", "--explain", "-s", "data_text.train=absent.txt", "-p", "no:clip")
    assert result.exit_code == 0, result.output
    assert "lr_scale  (seam, collected and multiplied)\n  1. lr_cosine" in result.output
    assert "clip" not in result.output


def test_schema_describes_engine_and_plugins() -> None:
    schema = json.loads(run("--schema").output)
    assert "until" in schema["properties"]
    block = schema["properties"]["plugins"]["properties"]["clip"]["anyOf"][0]
    assert "max_norm" in block["properties"]
    assert block["additionalProperties"] is False


def test_bug_in_a_plugin_ends_with_1_names_it_and_keeps_the_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nexus_plugins.clip import ClipPlugin

    def state_dict(self: ClipPlugin) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(ClipPlugin, "state_dict", state_dict)
    result = run("tiny.yaml", "--out", "one")
    assert result.exit_code == 1
    assert "planted [plugin 'clip', state_dict, step" in result.output
    assert json.loads(Path("one/summary.json").read_text())["status"] == "failed"


def test_plugins_are_listed_and_shown() -> None:
    listed = CliRunner().invoke(nexus_plugins, ["list"])
    assert "clip" in listed.output
    assert "nexus-trainer" in listed.output
    shown = CliRunner().invoke(nexus_plugins, ["show", "clip"])
    assert "max_norm" in shown.output
    assert "after_backward" in shown.output
    unknown = CliRunner().invoke(nexus_plugins, ["show", "clipp"])
    assert unknown.exit_code == 2
    assert "Did you mean 'clip'" in unknown.output


def test_help_does_not_import_torch() -> None:
    """Help must come at once; importing torch takes seconds."""
    code = (
        "import sys; from nexus_core.cli.run import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--plugins" in done.stdout


def test_a_signal_that_a_launcher_hands_on_is_the_same_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks if a signal to a group, which torchrun repeats, ends the run before it has saved."""
    now, ended = [0.0], list[int]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    engine = tiny_engine()
    with session.stopping_on_signals(engine) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] = 1.0
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
        assert engine.stop_reason == "SIGTERM"
        now[0] = 10.0
        monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(number))
        signal.raise_signal(signal.SIGTERM)
    assert ended == [signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_the_resumed_run_ends_in_the_same_bits(
    number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-u", "-m", "nexus_core.cli.run", "tiny.yaml", "-p", "console"]
    long = ["-s", "until=150 steps", "-s", "log_every=1", "-s", "checkpoint.every=1000 steps"]
    subprocess.run([*command, *long, "--out", "whole"], check=True, capture_output=True)
    with subprocess.Popen([*command, *long, "--out", "parts"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(number)
                break
        process.stdout.read()
    assert process.returncode == code
    assert json.loads(Path("parts/summary.json").read_text())["status"] == "stopped"
    resume = [*command, *long, "--out", "parts", "--resume", "auto"]
    subprocess.run(resume, check=True, capture_output=True)
    assert weights("whole", "step-00000150") == weights("parts", "step-00000150")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resuming. until is")
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_read_only_folder_is_one_clear_error_and_the_run_in_it_stays_good(resumed: bool) -> None:
    """Breaks if the error hides behind another one, or the last checkpoint is touched."""
    assert run("tiny.yaml", "--out", "runs/one", "-s", "until=4 steps").exit_code == 0
    mount = "mount --bind runs runs && mount -o remount,ro,bind runs && exec "
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*inside, mount + "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a folder read-only in a namespace")
    where = "--out runs/one --resume auto -s until=6" if resumed else "--out runs/two"
    done = subprocess.run(
        [*inside, f"{mount}{sys.executable} -m nexus_core.cli.run tiny.yaml {where}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("runs/one/config.yaml", "--resume", "auto", "-s", "until=6 steps").exit_code == 0
    assert weights("runs/one")
