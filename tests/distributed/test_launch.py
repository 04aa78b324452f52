"""`nexus-run` under torchrun: real processes that are killed, stopped, and started unlike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launcher import NEXUS_RUN, PATIENCE_S, process_of, start, wait_for, write_run

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc"),
]


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_killed_process_makes_all_start_again_where_they_had_saved(tmp_path: Path) -> None:
    """Red if a crash costs more than the steps since the last save, or changes the outcome."""
    write_run(tmp_path)
    ends = []
    for name in ("undisturbed", "killed"):
        options = ["--max-restarts", "1", *NEXUS_RUN, "tiny.yaml", "--out", name]
        launcher = start(tmp_path, 4, *options)
        if name == "killed":
            wait_for(lambda: lines(tmp_path / "killed") >= 12, launcher)
            os.kill(process_of(launcher, rank=2), signal.SIGKILL)
        output = launcher.communicate(timeout=PATIENCE_S)[0]
        assert launcher.returncode == 0, output
        ends.append(output)
    assert "resumed at step" in ends[1]
    one, other = (
        load_file(tmp_path / name / "checkpoints/final/model.safetensors")
        for name in ("undisturbed", "killed")
    )
    assert one.keys() == other.keys()
    worst = max(float((one[key] - other[key]).abs().max()) for key in one)
    assert worst <= 1e-6
    records = [
        json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records if "train/total_loss" in r] == list(range(1, 21))


def test_a_signal_to_one_process_saves_and_ends_all(tmp_path: Path) -> None:
    """Red if one process stops alone, if the save is not whole, or the exit code is another."""
    write_run(tmp_path, until="100000 steps")
    launcher = start(tmp_path, 2, *NEXUS_RUN, "tiny.yaml", "--out", "run")
    wait_for(lambda: lines(tmp_path / "run") >= 3, launcher)
    os.kill(process_of(launcher, rank=1), signal.SIGTERM)
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "SIGTERM")
    assert "exitcode  : 143" in output
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{summary['steps']:08d}"
    assert (saved[-1] / "manifest.json").exists()


def test_processes_that_were_started_unlike_end_with_one_error(tmp_path: Path) -> None:
    """Red if a run begins with two learning rates, or each process prints the error."""
    write_run(tmp_path)
    (tmp_path / "unlike.sh").write_text(
        'NEXUS_OPTIM_ADAMW__LR="0.00$((RANK + 1))" exec '
        f"{sys.executable} -m nexus_core.cli.run tiny.yaml --out run\n"
    )
    launcher = start(tmp_path, 2, "--no-python", "sh", "unlike.sh")
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    assert output.count("were not started alike") == 1, output
    assert "optim_adamw.lr is 0.002 in rank 1, 0.001 in rank 0" in output
    assert "exitcode  : 2" in output
    assert not (tmp_path / "run").exists()


def test_several_processes_without_a_plugin_for_it_are_refused(tmp_path: Path) -> None:
    """Red if each process trains a model of its own."""
    write_run(tmp_path)
    arguments = [*NEXUS_RUN, "tiny.yaml", "--plugins", "no:ddp", "--out", "run"]
    output = start(tmp_path, 2, *arguments).communicate(timeout=PATIENCE_S)[0]
    assert "--plugins ddp" in output
    assert "exitcode  : 2" in output


def test_a_process_that_hangs_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    """Red if the others wait for ever, or do not say who waited where."""
    write_run(tmp_path, until="100000 steps")
    options = [*NEXUS_RUN, "tiny.yaml", "--out", "run", "--set", "ddp.timeout=4"]
    launcher = start(tmp_path, 2, *options)
    wait_for(lambda: lines(tmp_path / "run") >= 3, launcher)
    stopped = process_of(launcher, rank=1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_for(partial(waited, tmp_path / "run"), launcher)
    finally:
        os.kill(stopped, signal.SIGCONT)
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    assert "rank 0 of 2, in " in output, output


def waited(out: Path) -> bool:
    """Whether the main process has written that the run failed."""
    path = out / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "failed"


def test_the_benchmark_times_both_and_they_do_the_same_work(tmp_path: Path) -> None:
    """Red if a case no longer runs or ends with other weights; the ratio is not judged here."""
    path = tmp_path / "times.json"
    command = [sys.executable, "-m", "benchmarks.distributed", "--rounds", "1", "--steps", "12"]
    command += ["--width", "32", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    times = json.loads(path.read_text()) if path.exists() else done.stderr
    assert times.keys() == {"alone", "ours", "by hand", "over", "speed"}
    assert min(times["alone"] + times["ours"] + times["by hand"]) > 0
