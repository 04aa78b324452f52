"""What users of `nexus-run` see: output, exit codes, files; and what must never happen."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click import Command
from click.testing import CliRunner, Result

from nexus_core import ConfigError, DataError, Engine, hookimpl
from nexus_core.cli import session
from nexus_core.cli.plugins import main as nexus_plugins
from nexus_core.cli.run import main as nexus_run
from nexus_core.cli.run import resume as nexus_resume
from nexus_core.cli.settings import presets
from nexus_plugins.jsonl import JsonlPlugin
from nexus_plugins.lr_rsqrt import LrRsqrtPlugin
from tests.distributed.processes import ran
from tiny import tiny_engine


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in its own folder, with a small corpus and a config for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nexus_plugins.model_nexus.plugin.SAMPLE", 8)  # a longer one is slow
    prepare()
    return tmp_path


def prepare() -> None:
    """Write the corpus and the config to the current folder."""
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


def run(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_run, arguments)


def weights(out: str, checkpoint: str = "step-00000006") -> bytes:
    return (Path(out) / "checkpoints" / checkpoint / "model.safetensors").read_bytes()


def test_run_leaves_config_log_checkpoint_and_summary_and_config_repeats_it() -> None:
    result = run("tiny.yaml", "--out", "one")
    assert result.exit_code == 0, result.output
    assert "val/loss" in result.output
    for label in ("checkpoints", "metrics", "compared", "sample"):
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


@pytest.mark.slow
@pytest.mark.parametrize("until", ["1 steps", "7 steps", "0.3 s", "0.1 epochs"])
@pytest.mark.parametrize("preset", sorted(set(presets()) - {"sft", "dpo", "modules"}))
def test_every_preset_runs_until_whatever_end(preset: str, until: str) -> None:
    """Fails if a length in a preset does not fit runs of other lengths."""
    small = {
        "data_text": ("train=corpus.txt", "seq_len=32", "batch_size=4"),
        "model_nexus": ("d_model=16", "ssm_n_layers=1", "ssm_head_dim=16", "vocab_size=300"),
    }
    sets = [f"{name}.{one}" for name, keys in small.items() for one in keys]
    options = [word for one in (f"until={until}", *sets) for word in ("--set", one)]
    result = run(preset, "--out", "one", "--plugins", "no:tensorboard", *options)
    assert result.exit_code == 0, result.output
    summary = json.loads(Path("one/summary.json").read_text())
    assert (summary["status"], summary["steps"] > 0) == ("finished", True)
    assert Path("one/checkpoints/final").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.yaml", "-p", "clipp"], "no plugin named 'clipp'. Did you mean 'clip'"),
        (["tiny.yaml", "-s", "clip.max_nrom=1"], "unknown key 'clip.max_nrom'. Did you mean"),
        (["tiny.yaml", "-s", "clip.max_norm=big"], "clip.max_norm: got 'big'"),
        (["tiny.yaml", "-s", "data_text.train=absent.txt"], "absent.txt"),
        (["tiny.yaml", "-s", "data_text.train=empty.txt"], "empty.txt"),
        (["no_such_preset"], "no preset or config file named 'no_such_preset'"),
        (["tiny.yaml", "-s", "until=2.5", "epochs"], "quotes: --set until='2.5 epochs'\n"),
        (["-s", "until=", "5", "steps"], "quotes: --set until='5 steps'\n"),
        (["tiny.yaml", "-s", "sample.prompt=a", "b", "c"], "quotes: --set sample.prompt='a b c'\n"),
        (
            ["tiny.yaml", "-p", "amp,", "ema"],
            "'ema'; expected one config or preset. It is a plugin",
        ),
        (["modules", "sft", "-s", "seed=1"], "'sft'; expected one config or preset.\n"),
        (["tiny.yaml", "", "--explain"], "unexpected ''; expected one config or preset.\n"),
        (["2024"], "no preset or config file named '2024'"),
        (["tiny.yaml", "compare"], "A command comes first: nexus-run compare ..."),
        (["resume", "-s", "seed=1", "tiny.yaml"], "write: nexus-run resume RUN OPTIONS\n"),
        (["genrate", "runs/a"], "Did you mean 'generate'? See: nexus-run --help\n"),
        (["corpus.txt"], "To train on it: nexus-run --set data_text.train=corpus.txt\n"),
        (["list"], "See: nexus-plugins --help\n"),
        (["tiny.yaml", "-s", "plugins.clip.max_norm=1"], "not in this run. Write clip.max_norm"),
        (["tiny.yaml", "-s", "clip=1"], "It is a plugin: set clip.KEY (nexus-plugins show clip)"),
        (["tiny.yaml", "-p", "nope"], "no plugin named 'nope'. All installed: nexus-plugins list;"),
        (
            ["tiny.yaml", "-s", "data_text.x=1"],
            "'data_text.x'. All: nexus-plugins show data_text.\n",
        ),
        (["tiny.yaml", "-p", "lr_linear"], "both fill the slot 'lr'"),
        (["tiny.yaml", "-s", "lr_cosine.warmup=9 steps"], "lr_cosine.warmup is 9 steps"),
        (["tiny.yaml", "-s", "device=toaster"], "cannot use the device 'toaster'"),
        (["tiny.yaml", "--resume", "nowhere"], "nowhere"),
        (["tiny.yaml", "-p", "no:loss_lm"], "no loss: pass"),
        (["tiny.yaml", "-p", "no:optim_adamw"], "no optimizer: pass"),
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
    assert "already holds a run" in result.output
    assert Path("one/metrics.jsonl").read_bytes() == log


def test_a_mistake_takes_nothing_away_from_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that ends immediately removes files that another run has just written."""

    def neighbour(*_: object) -> None:
        Path("runs/other/checkpoints").mkdir(parents=True)
        raise DataError("planted")

    monkeypatch.setattr(session, "_fit", neighbour)
    assert run("tiny.yaml").exit_code == 2
    assert [path.name for path in Path("runs").iterdir()] == ["other"]
    assert Path("runs/other/checkpoints").exists()


@pytest.mark.parametrize(
    "name", ["2025-01-31", "42", "#5", "null", "a: b", "run-😀", "läufe", "[x]", "1e3", "a$b", "~x"]
)
@pytest.mark.parametrize("option", ["--out={}", "-sout={}"])
def test_a_folder_may_have_any_name(name: str, option: str) -> None:
    option = option if name != "null" else "--out={}"
    short = ["-s", "until=1", "-p", "no:lr_cosine,no:clip,no:checkpoint", "--quiet"]
    result = run("tiny.yaml", option.format(name), *short)
    assert result.exit_code == 0, result.output
    assert Path(name, "summary.json").exists()
    settings = yaml.safe_load(Path(name, "config.yaml").read_text())
    assert settings["out"] == name


def test_paths_of_options_expand_home_and_variables(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    dry = ["-s", "until=1", "-p", "no:lr_cosine", "--quiet"]
    assert run("tiny.yaml", "--out=~/a", *dry).exit_code == 0
    assert run("tiny.yaml", "--out=${HOME}/b", *dry).exit_code == 0
    assert {path.name for path in (folder / "home").iterdir()} >= {"a", "b"}
    unset = run("tiny.yaml", "--out=$NOT_SET/b", *dry)
    assert unset.exit_code == 2
    assert "the variable $NOT_SET is not set" in unset.output


def test_a_name_that_cannot_be_made_is_one_clear_error(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    for name in ("n" * 300, "corpus.txt", "corpus.txt/x", ""):
        result = run("tiny.yaml", "--out", name)
        assert result.exit_code == 2
        assert result.output.count("\n") <= 4
    assert sorted(folder.rglob("*")) == before


# -- two runs, one folder


def test_two_automatic_names_in_one_second_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    options = ["tiny.yaml", "-s", "until=1", "-p", "no:lr_cosine", "--quiet"]
    for _ in range(3):
        assert run(*options).exit_code == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == [f"tiny-20260101-000000{end}" for end in ("", "-2", "-3")]
    assert "runs/tiny-20260101-000000-3" in run(*options, "--resume", "auto").output


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_of_two_starts_in_one_folder_the_second_touches_nothing(
    resume: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the rejected run removes the other's folder, or writes to it."""
    fit = session._fit
    seen: list[dict[str, bytes]] = []
    held: list[int] = []

    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in Path("one").rglob("*") if p.is_file()}

    def second(engine: Engine, *rest: Any) -> Any:
        """The first run starts between the second's check of the folder and its start."""
        monkeypatch.setattr(session, "_fit", fit)
        assert run(*options, "-s", "seed=1").exit_code == 0
        held.append(os.open("one/run.lock", os.O_RDONLY))
        fcntl.flock(held[0], fcntl.LOCK_EX)  # it is still running
        seen.append(content())
        return fit(engine, *rest)

    monkeypatch.setattr(session, "_fit", second)
    options = ["tiny.yaml", "--out", "one", "-s", "until=2", "-p", "no:lr_cosine", "--quiet"]
    result = run(*options, "-s", "seed=2", *resume)
    assert result.exit_code == 2
    assert (
        "in use by process" in result.output if resume else "already holds a run" in result.output
    )
    assert content() == seen[0]
    os.close(held[0])


def test_a_run_that_never_began_leaves_no_empty_folder(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert run("tiny.yaml", "-s", "data_text.train=absent.txt").exit_code == 2
    assert sorted(folder.rglob("*")) == before


# -- resuming


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps with custom settings; tests resume copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare()
        options = ["-p", "no:lr_cosine", "-s", "clip.max_norm=0.7", "-s", "until=4", "--quiet"]
        assert run("tiny.yaml", "--out", "one", *options).exit_code == 0
    return folder / "one"


@pytest.mark.filterwarnings("ignore:resuming. until is")
@pytest.mark.parametrize("source", ["one", "one/checkpoints/best", "one/checkpoints", "moved"])
def test_resuming_a_run_takes_its_config(source: str, trained: Path) -> None:
    out = source.partition("/")[0]
    shutil.copytree(trained, out, symlinks=True)
    result = run("--resume", source, "-s", "until=6")
    assert result.exit_code == 0, result.output
    assert "resumed at step 4" in result.output
    assert f" in {out}\n" in result.output
    settings = yaml.safe_load(Path(out, "config.yaml").read_text())
    assert settings["plugins"]["clip"]["max_norm"] == 0.7
    assert settings["plugins"]["model_nexus"]["d_model"] == 16
    other = run("--resume", source, "-s", "until=8", "--out", "other", "--quiet")
    assert other.exit_code == 0, other.output
    assert Path("other/checkpoints/step-00000008").is_dir()
    assert not Path(out, "checkpoints/step-00000008").exists()


def test_resuming_a_folder_without_a_config_is_one_clear_error() -> None:
    Path("some/checkpoints").mkdir(parents=True)
    result = run("--resume", "some")
    assert result.exit_code == 2
    assert "'some' has no config.yaml; name the config of its run" in result.output


def test_quiet_is_of_this_command_and_not_of_the_run() -> None:
    options = ["tiny.yaml", "-p", "console", "-s", "until=2"]
    assert "step" not in run(*options, "--out", "one", "--quiet").output.replace("at step", "")
    assert yaml.safe_load(Path("one/config.yaml").read_text())["plugins"]["console"] == {
        "every": "10 seconds",
        "quiet": False,
        "verbose": False,
    }


# -- the terminal


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_any_encoding_of_the_output_will_do(encoding: str) -> None:
    code = (
        "import click; from nexus_core.cli.errors import reported\n"
        "with reported(False):\n"
        "    click.echo('é😀\\udcff'); print('é😀\\udcff'); raise ValueError('é😀')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env=environment
    )
    assert done.returncode == 1
    said = done.stderr.decode("utf-16" if encoding == "utf-16" else "latin-1")
    assert "Traceback" not in said
    assert "ValueError: " in said


def test_what_a_model_writes_does_nothing_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a sample of bytes clears the screen, or hides later output."""
    sample = "a\x1b[2J\x07\r\x9b1m\x00é　b\nc\td"
    monkeypatch.setattr(JsonlPlugin, "summarize", hookimpl(lambda self: {"sample": sample}))
    result = run("tiny.yaml", "--out", "one", "-s", "until=1", "-p", "no:lr_cosine")
    assert "a\\x1b[2J\\x07\\r\\x9b1m\\x00é　b\n" in result.output
    assert "\x1b" not in result.output


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def coloured() -> bool:
        result = CliRunner().invoke(nexus_run, ["nowhere.yaml"], color=True)
        return "\x1b[" in result.output

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured()


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_a_second_interrupt_ends_at_once_and_says_what_was_kept(saved: bool) -> None:
    """The first comes after the second step, which was saved, and the other immediately after."""
    code = (
        "import os, signal, sys\n"
        "from nexus_core.cli.run import main\n"
        "from nexus_plugins.clip import ClipPlugin\n"
        "from nexus_core import hookimpl\n"
        "def interrupt(self, engine, batch):\n"
        "    if engine.state.step == 4:\n"
        "        os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
        "ClipPlugin.on_batch = hookimpl(interrupt)\n"
        "main(sys.argv[1:])\n"
    )
    every = "checkpoint.every=2 steps" if saved else "checkpoint.every=100 steps"
    options = ["tiny.yaml", "--out", "one", "-s", every, "-s", "checkpoint.sync=true"]
    Path("interrupted.py").write_text(code)
    done = ran(Path("interrupted.py").absolute(), *options, folder=Path.cwd())
    assert done.returncode == -signal.SIGINT
    first, last = done.stderr.split("\n\n")
    assert "stopping after this step; Ctrl-C again ends the run at once" in first
    kept = "kept: one/checkpoints/step-00000004; to resume: nexus-run resume one"
    assert (kept if saved else "no checkpoint had been saved in one") in last
    assert last.startswith("ended immediately at step 4; ")
    assert last.count("\n") == 1


def test_a_hint_is_in_the_words_of_the_command() -> None:
    result = run("tiny.yaml", "-p", "lr_rsqrt,no:lr_cosine", "-s", "lr_rsqrt.warmup=null")
    assert "--set lr_rsqrt.timescale='1000 steps'" in result.output
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    plugins = [LrRsqrtPlugin(warmup=None)]
    engine = Engine(model, optimizer, loss=lambda model, batch: model(batch).sum(), plugins=plugins)
    with pytest.raises(ConfigError, match=r"LrRsqrtPlugin\(timescale='1000 steps'\)"):
        engine.fit([torch.ones(1)], until=1)


@pytest.mark.filterwarnings("ignore:resuming. until is")
def test_auto_finds_the_runs_of_this_very_config() -> None:
    """Fails if `my` resumes from the checkpoints of `my-big`."""
    for folder in ("tiny-20250101-000000", "tiny-big-20260101-000000"):
        assert run("tiny.yaml", "--out", f"runs/{folder}", "-s", "until=4").exit_code == 0
    resumed = run("tiny.yaml", "--resume", "auto", "-s", "until=5")
    assert "resumed at step 4" in resumed.output
    assert "in runs/tiny-20250101-000000" in resumed.output
    newest = CliRunner().invoke(nexus_resume, ["--dry-run"])
    assert (newest.exit_code, newest.output.split("\n")[0]) == (0, "resumed at step 5")
    assert CliRunner().invoke(nexus_resume, ["--out", "runs/other"]).exit_code == 2


@pytest.mark.filterwarnings("ignore:resuming. until is")
def test_run_that_is_extended_ends_like_one_that_was_not_stopped() -> None:
    """With a constant rate, so that the horizon does not matter: 4 steps and then 2 equal 6."""
    constant = ["-p", "no:lr_cosine"]
    assert run("tiny.yaml", "--out", "whole", *constant).exit_code == 0
    assert run("tiny.yaml", "--out", "parts", *constant, "-s", "until=4 steps").exit_code == 0
    result = run("tiny.yaml", "--out", "parts", *constant, "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert "resumed at step 4" in result.output
    assert weights("whole") == weights("parts")
    assert run("--resume", "parts").output == (
        "resumed at step 6\nparts is finished (until 6 steps); to train further: nexus-run resume "
        "parts --set until='12 steps'; its results: nexus-run runs show parts\n"
    )


@pytest.mark.parametrize("more", ["", "pcgrad,loss_energy", "weigh_gradnorm,loss_energy"])
def test_dry_run_reports_and_writes_nothing(folder: Path, more: str) -> None:
    before = sorted(folder.rglob("*"))
    result = run("tiny.yaml", "--dry-run", "-p", more)
    assert result.exit_code == 0, result.output
    assert "tokens per step 128" in result.output
    assert "parameters" in result.output
    assert "val/loss" in result.output
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (nexus_run, "--reume auto", "no such option '--reume'. Did you mean '--resume'? See: "),
        (nexus_run, "--out", "option '--out' requires an argument. See: "),
        (nexus_run, "--resume-policy x", "invalid value for '--resume-policy': 'x' is not one of"),
        (nexus_run, "diff", "missing argument 'RUN_A'. Expected: nexus-run diff [OPTIONS] RUN_A"),
        (nexus_run, "diff a b c", "got unexpected extra argument (c). Expected: nexus-run diff"),
        (nexus_plugins, "shwo", "no such command 'shwo'. Did you mean 'show'? See: "),
        (nexus_plugins, "show", "missing argument 'NAME|FILE.py'. Expected: "),
    ],
)
def test_a_mistyped_command_is_one_line(command: Command, words: str, said: str) -> None:
    """Fails if click reports it in its own form: four lines, with the usage first."""
    done = CliRunner().invoke(command, words.split())
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert done.output.startswith(f"error: {said}")
    assert done.output.endswith(" --help\n")


def test_dry_run_tries_the_checkpoint_as_well(folder: Path) -> None:
    """Fails if a dry run does not report a checkpoint that cannot be resumed from."""
    short = ["-s", "until=1", "-p", "no:lr_cosine"]
    assert run("tiny.yaml", "--out", "done", *short, "--quiet").exit_code == 0
    before = sorted(folder.rglob("*"))
    for source in ("auto", "final", "done"):
        result = run("tiny.yaml", "--out", "done", *short, "--resume", source, "--dry-run")
        assert "resumed at step 1\n" in result.output, result.output
    refused = run("tiny.yaml", "--resume", "absent", "--dry-run")
    assert refused.exit_code == 2
    assert "no checkpoint at 'absent'" in refused.output
    assert sorted(folder.rglob("*")) == before


def test_explain_shows_the_plan_without_building_anything() -> None:
    result = run("tiny.yaml", "--explain", "-s", "data_text.train=absent.txt", "-p", "no:clip")
    assert result.exit_code == 0, result.output
    assert "lr_scale  (seam, collected and multiplied)\n  1. lr_cosine" in result.output
    assert "clip" not in result.output


def test_bug_in_a_plugin_ends_with_1_names_it_and_keeps_the_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nexus_plugins.clip import ClipPlugin

    def state_dict(self: ClipPlugin) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(ClipPlugin, "state_dict", state_dict)
    result = run("tiny.yaml", "--out", "one")
    assert result.exit_code == 1
    assert re.search(
        r"planted \[plugin 'clip', state_dict, step \d\] \[.*test_cli.py:\d+, in state_dict\]",
        " ".join(result.output.split()),
    )
    assert json.loads(Path("one/summary.json").read_text())["status"] == "failed"


def test_plugins_are_listed_and_shown() -> None:
    listed = CliRunner().invoke(nexus_plugins, ["list"])
    assert "clip" in listed.output
    shown = CliRunner().invoke(nexus_plugins, ["show", "clip"])
    assert "max_norm" in shown.output
    assert "after_backward" in shown.output
    unknown = CliRunner().invoke(nexus_plugins, ["show", "clipp"])
    assert unknown.exit_code == 2
    assert "Did you mean 'clip'" in unknown.output


def test_help_does_not_import_torch() -> None:
    """Help must be immediate; importing torch takes seconds."""
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
    """Fails if a signal to a group, repeated by torchrun, ends the run before it has saved."""
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
def test_signal_saves_and_the_resumed_run_ends_in_the_same_bits() -> None:
    """Compares a process that gets the signal at its first line with an undisturbed one."""
    options = ["tiny.yaml", "-p", "console", "-s", "until=150 steps", "-s", "log_every=1",
               "-s", "checkpoint.every=1000 steps"]  # fmt: skip
    assert run(*options, "--out", "whole").exit_code == 0
    for number, code, status in (
        (signal.SIGTERM, 143, "stopped"),
        (signal.SIGINT, 130, "interrupted"),
    ):
        parts = number.name
        command = [sys.executable, "-u", "-m", "nexus_core.cli.run", *options, "--out", parts]
        with subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step"):
                    process.send_signal(number)
                    break
            process.stdout.read()
        assert process.returncode == code
        assert json.loads(Path(parts, "summary.json").read_text())["status"] == status
        resumed = run(*options, "--out", parts, "--resume", "auto")
        assert resumed.exit_code == 0, resumed.output
        assert weights("whole", "step-00000150") == weights(parts, "step-00000150"), parts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resuming. until is")
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_read_only_folder_is_one_clear_error_and_the_run_in_it_stays_good(resumed: bool) -> None:
    """Fails if another error hides it, or the last checkpoint is modified."""
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


@pytest.mark.slow
def test_a_mistake_in_a_run_to_be_verified_is_one_message(folder: Path) -> None:
    """Fails if a mistake in the run of `verify-resume` ends in that run's traceback."""
    result = run("verify-resume", "absent.yaml", "--out", "verified")
    assert result.exit_code == 2
    assert result.output.startswith("error: cannot read the config file 'absent.yaml'")
    assert "Traceback" not in result.output
