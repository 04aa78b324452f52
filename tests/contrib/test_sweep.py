"""`nexus-run sweep`: what it searches, and that a killed sweep resumes with its trials."""

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
from click.testing import CliRunner

from nexus_core import ConfigError
from nexus_core.cli.launch import Recipe
from nexus_core.cli.records import Run, find_runs
from nexus_core.cli.run import main

optuna = pytest.importorskip("optuna")

from nexus_plugins_contrib.sweep.plots import save_plots  # noqa: E402
from nexus_plugins_contrib.sweep.space import read_dimension  # noqa: E402
from nexus_plugins_contrib.sweep.study import Search, StudyDirection, opened, storage, trial_of  # noqa: E402

LR = "optim_adamw.lr=log(1e-3,1e-1)"


@pytest.mark.parametrize(
    ("text", "low", "high", "inside", "outside"),
    [
        ("a.b=log(1e-4,1e-2)", 1e-4, 1e-2, 0.003, 0.1),
        ("a.b=uniform(0, 1)", 0.0, 1.0, 0.5, -0.1),
        ("a.b=int(1,9,2)", 1, 9, 5, 12),
        ("a.b=intlog(16,1024)", 16, 1024, 64, 2048),
    ],
)
def test_a_range_holds_what_it_says(
    text: str, low: float, high: float, inside: float, outside: float
) -> None:
    dimension = read_dimension(text)
    assert (dimension.key, dimension.edges()) == ("a.b", (low, high))
    assert dimension.admits(inside) == inside
    assert dimension.admits(outside) is None
    assert dimension.admits(True) is None
    study = optuna.create_study()
    drawn = [study.ask({"x": dimension.distribution()}).params["x"] for _ in range(20)]
    assert all(low <= value <= high for value in drawn)
    assert len(set(drawn)) > 1


def test_choices_are_texts_as_settings_are_written() -> None:
    dimension = read_dimension("until=choice(5 steps, 0.10, null)")
    assert dimension.edges() == ("5 steps", "0.10", "null")
    assert dimension.admits(0.1) == "0.10"
    assert dimension.admits(7) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "cannot be read"),
        ("lr=loud(1,2)", "cannot be read"),
        ("lr=log(0,1)", "above 0"),
        ("lr=log(1,2,3)", "takes numbers"),
        ("lr=uniform(2,1)", "is not below"),
        ("lr=uniform(a,b)", "takes numbers"),
        ("n=int(1,2.5)", "whole numbers"),
        ("n=int(1,8,9)", "a step"),
        ("n=choice(a)", "at least two"),
    ],
)
def test_a_space_that_cannot_be_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_dimension(text)


def search(**given: Any) -> Search:
    values: dict[str, Any] = {"space": (read_dimension(LR),), "metric": "val/loss", "mode": "min"}
    return Search(**{"recipe": Recipe("quickstart"), **values, **given})


def test_a_folder_is_of_one_sweep_and_one_process(tmp_path: Path) -> None:
    with opened(tmp_path, search(), 1) as study:
        study.tell(study.ask({"x": read_dimension(LR).distribution()}), 1.0)
        with pytest.raises(ConfigError, match="is running"), opened(tmp_path, search(), 1):
            pass
    with pytest.raises(ConfigError, match="metric differ"), opened(tmp_path, search(metric="m"), 1):
        pass
    with (tmp_path / "sweep.journal").open("a") as journal:
        journal.write('{"op_code": 4, "wor')  # torn by a power failure
    with opened(tmp_path, search(seed=5), 1) as study:
        study.tell(study.ask({"x": read_dimension(LR).distribution()}), 2.0)
    with opened(tmp_path, search(), 1) as study:
        assert [trial.value for trial in study.trials] == [1.0, 2.0]


def test_a_trial_that_is_behind_is_pruned_in_the_process_that_trains_it(tmp_path: Path) -> None:
    space = {"x": read_dimension(LR).distribution()}
    with opened(tmp_path, search(), 1) as study:
        for value in (1.0, 1.1, 1.2, 1.3):
            good = study.ask(space)
            good.report(value, 10)
            study.tell(good, value)
        ahead, behind = (trial_of(tmp_path, study.ask(space)._trial_id) for _ in range(2))
        ahead.report(0.5, 10)
        behind.report(9.0, 10)
        assert (ahead.should_prune(), behind.should_prune()) == (False, True)
        assert {path.name for path in save_plots(study, tmp_path)} == {
            "history.png", "slice.png", "curves.png"
        }  # fmt: skip
        assert all(
            (tmp_path / n).read_bytes()[:4] == b"\x89PNG" for n in ("history.png", "slice.png")
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--over", "optim_muon.lr=log(1e-3,1)", "--over", "clip.max_norm=uniform(-1,1)"],
            "max_norm",
        ),
        (["--over", "optim_adam.lr=log(1e-3,1)"], "optim_adam"),
        (["--over", "lr=logarithm(1,2)"], "cannot be read"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_trained(
    words: list[str], said: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["sweep", "quickstart", *words, "--out", str(out)])
    assert result.exit_code == 2
    assert said in result.output
    assert not out.exists()


TINY = """
until: 12 steps
log_every: 4 steps
eval_every: 4 steps
plugins:
  data_text: {train: corpus.txt, seq_len: 32, batch_size: 2}
  model_nexus: {d_model: 16, ssm_n_layers: 1, ssm_head_dim: 16}
  loss_lm: {}
  optim_adamw: {lr: 1.0e-2}
  checkpoint: {every: 4 steps}
  jsonl: {}
"""


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the next sweep in the folder waits forever."""
    monkeypatch.chdir(tmp_path)
    code = (
        "import os; from pathlib import Path; import nexus_plugins_contrib.sweep.study as study\n"
        "study.storage(Path('.')).create_new_study([study.StudyDirection.MINIMIZE], 'sweep')\n"
        "study.JournalLock(Path('sweep.journal')).acquire()\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [each.study_name for each in storage(Path()).get_all_studies()] == ["sweep"]
    storage(Path()).create_new_study([StudyDirection.MAXIMIZE], "other")


@pytest.mark.slow
def test_a_killed_sweep_keeps_its_trials_and_ends_with_ordinary_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(
        "".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600))
    )
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "nexus_core.cli.run", "sweep", "tiny.yaml", "--over", LR,
               "--trials", "4", "--jobs", "2", "--pruner", "none", "--out", "out"]  # fmt: skip
    first = subprocess.Popen(command, cwd=tmp_path)
    done = tmp_path / "out/trial-0000/summary.json"
    while first.poll() is None and not done.exists():
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = (tmp_path / "out/trial-0000/metrics.jsonl").read_bytes()
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "4 trials: 4 complete" in said.stdout
    assert (tmp_path / "out/trial-0000/metrics.jsonl").read_bytes() == kept
    runs = find_runs(tmp_path / "out")
    assert [run.name for run in runs] == [f"trial-{number:04d}" for number in range(4)]
    assert {run.status for run in runs} == {"finished"}
    own, *others = (run.settings["plugins"]["optim_adamw"]["lr"] for run in runs)
    assert own == 0.01, "the config's own value is tried first"
    assert len({own, *others}) == 4
    best = min(runs, key=lambda run: run.last_metrics["val/loss"])
    assert f"the best: out/{best.name}" in said.stdout
    counted = json.loads(CliRunner().invoke(main, [*command[3:], "--json"]).output)
    assert [trial["value"] for trial in counted["trials"]] == [
        run.last_metrics["val/loss"] for run in runs
    ]
    assert counted["trials"][counted["best"]]["run"] == f"out/{best.name}"
    again = CliRunner().invoke(main, ["out/trial-0001/config.yaml", "--out", "again"])
    assert again.exit_code == 0, again.output
    ours, theirs = runs[1].last_metrics, Run(tmp_path / "again").last_metrics
    assert ours["val/loss"] == theirs["val/loss"], "a trial is a run like any other"
