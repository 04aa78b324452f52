"""`nexus-run runs`: what it reports about run folders in any state."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nexus_core.cli.records import Run, find_runs
from nexus_core.cli.run import main
from written import write_run


def command(*words: str) -> str:
    result = CliRunner().invoke(main, ["runs", *words])
    assert result.exit_code == 0, result.output
    return result.output


def mistake(*words: str) -> str:
    result = CliRunner().invoke(main, ["runs", *words])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    return result.output


def test_every_run_below_a_folder_is_listed_with_its_state(tmp_path: Path) -> None:
    write_run(tmp_path / "b", (3.0, 2.5), seed=7)
    write_run(tmp_path / "deep/a", (3.0, 1.5), status="failed")
    parent = {"run": "/runs/b", "step": 10, "source": "checkpoints/step-00000010",
              "changes": {"until": ["30 steps", "40 steps"]}}  # fmt: skip
    write_run(tmp_path / "deep/c", status=None, parent=parent)
    (tmp_path / "template").mkdir()
    (tmp_path / "template/config.yaml").write_text("until: 5 steps\n")
    rows = [line.split() for line in command(str(tmp_path)).splitlines()]
    assert rows[0] == ["run", "status", "step", "val/loss", "seed", "time", "size", "from"]
    assert rows[1][:7] == ["b", "finished", "20", "2.5000", "7", "1", "min"]
    assert rows[2][:4] == ["deep/a", "failed", "20", "1.5000"]
    assert rows[3][:4] == ["deep/c", "unfinished", "30", "1.0000"]
    assert rows[3][-1] == "/runs/b@10"
    assert " ".join(rows[4]).startswith("3 runs below")
    assert "/runs/b@10" in command("show", str(tmp_path / "deep/c"))


def test_the_best_comes_first_where_asked_for(tmp_path: Path) -> None:
    for name, value in {"a": 2.0, "b": 1.0, "c": 3.0}.items():
        write_run(tmp_path / name, (value,))
    write_run(tmp_path / "other", (9.0,), metric="val/other")
    lines = command(str(tmp_path), "--sort", "val/loss").splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["b", "a", "c", "other"]
    lines = command(str(tmp_path), "--sort", "-val/loss").splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["c", "a", "b", "other"]
    assert "Did you mean 'val/loss'?" in mistake(str(tmp_path), "-m", "val/lose")
    assert "is not a folder" in mistake(str(tmp_path / "nowhere"))
    assert "is not a run folder" in mistake("show", str(tmp_path))


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status="stopped")
    (run / "run.lock").write_text('{"pid": 1}')  # of a run that was killed
    assert Run(run).status == "stopped"
    with (run / "run.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code = (
            f"from nexus_core.cli.records import *; print(find_runs(Path({str(run)!r}))[0].status)"
        )
        code = f"from pathlib import Path; {code}"
        asked = [sys.executable, "-c", code]
        assert subprocess.check_output(asked, text=True).strip() == "running"
    with (run / "run.lock").open("w"):
        assert Run(run).status == "stopped"


def test_metrics_beyond_the_summary_show_that_a_later_life_was_killed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (3.0,), status="stopped")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "tokens": 2500, "val/loss": 0.5}\n{"step": 30, "tok')
    assert (Run(run).status, Run(run).step, Run(run).tokens) == ("unfinished", 25, 2500)
    assert Run(run).last_metrics == {"val/loss": 0.5}


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "lineage.jsonl"])
def test_a_damaged_file_of_a_run_does_no_harm_to_the_list(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    for damaged in (b"\xff\xfe{", b"[1, 2]\n", b'{"step": "x", "steps": {}}\n'):
        (run / name).write_bytes(damaged)
        assert "1 run below" in command(str(tmp_path))


def test_runs_are_read_by_programs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (3.0, 2.0))
    (listed,) = json.loads(command(str(tmp_path), "--json"))
    shown = json.loads(command("show", str(run), "--json"))
    assert listed["metrics"] == shown["metrics"] == {"val/loss": 2.0}
    assert shown["settings"]["until"] == "30 steps"
    assert sum(shown["files"].values()) == shown["size"] == Run(run).size
    assert listed["checkpoints"] == ["checkpoints/step-00000020"]


def test_a_metric_of_several_runs_is_drawn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    picture = tmp_path / "both.png"
    said = command("plot", str(tmp_path), "-m", "val/loss", "--png", str(picture), "--log")
    assert f"a {tmp_path}/a" in said
    assert f"b {tmp_path}/b" in said
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "no run here has a metric" in mistake("plot", str(tmp_path), "-m", "nothing")


def test_runs_within_a_run_are_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "checkpoints/step-00000030/config.yaml").write_text("until: 30 steps\n")
    write_run(run / "inner")
    assert [found.path for found in find_runs(tmp_path)] == [run]
