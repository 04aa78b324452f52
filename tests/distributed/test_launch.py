"""`nexus-run` under torchrun: processes that are killed, stopped, or started differently."""

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

from nexus_core.testing import fake_distribution
from nexus_plugins.checkpoint.export import export
from tests.distributed.launcher import NEXUS_RUN, PATIENCE_S, process_of, start, wait_for, write_run
from tests.distributed.processes import together
from tests.distributed.works import command

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc"),
]


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


RANKS = 3
WITNESS = '''
import json, os
from nexus_core import Plugin, PluginConfig, hookimpl


class WitnessPlugin(Plugin[PluginConfig]):
    """Writes the samples of each step into a file of this process, as a crash would leave it."""

    @hookimpl
    def on_batch(self, engine, batch):
        step, ids = engine.state.step + 1, batch["sample_ids"].tolist()
        with open(f"{os.environ['WITNESS']}.{engine.ranks.rank}", "a") as file:
            file.write(json.dumps([step, ids]) + "\\n")
            file.flush()
            os.fsync(file.fileno())
'''


def witnessed(folder: Path, name: str) -> dict[int, list[int]]:
    """The samples of each step over all processes; of repeated steps the last time."""
    kept: dict[tuple[int, int], list[int]] = {}
    for rank in range(RANKS):
        for line in (folder / f"{name}.{rank}").read_text().splitlines():
            step, ids = json.loads(line)
            kept[step, rank] = ids
    return {
        step: sorted(i for rank in range(RANKS) for i in kept[step, rank])
        for step in sorted({step for step, _ in kept})
    }


@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
def test_a_killed_process_makes_all_start_again_where_they_had_saved(
    plugin: str, tmp_path: Path
) -> None:
    """Fails if a crash costs more than the steps since the last save, or changes the result.

    Also fails if a sample is skipped or repeated in the one complete epoch.
    """
    write_run(tmp_path)
    (tmp_path / "witness.py").write_text(WITNESS)
    chosen = "./witness.py" if plugin == "ddp" else f"no:ddp,{plugin},./witness.py"
    options = ["tiny.yaml", "--plugins", chosen, "--set", "batch_size=30"]
    undisturbed = [*options, "--out", "undisturbed"]
    together(RANKS, command, tmp_path, undisturbed, {"WITNESS": str(tmp_path / "undisturbed")})
    launcher = start(
        tmp_path,
        RANKS,
        *("--max-restarts", "1", *NEXUS_RUN, *options, "--out", "killed"),
        environment={"WITNESS": str(tmp_path / "killed")},
    )
    wait_for(lambda: lines(tmp_path / "killed") >= 12, launcher)
    os.kill(process_of(launcher, rank=1), signal.SIGKILL)
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    assert launcher.returncode == 0, output
    assert (tmp_path / "killed/plugins/witness.py").read_text() == WITNESS
    assert "resumed at step" in output
    for name in ("undisturbed", "killed"):
        export(tmp_path / name / "checkpoints/final", tmp_path / f"{name} model")
    one, other = (
        load_file(tmp_path / f"{name} model/model.safetensors")
        for name in ("undisturbed", "killed")
    )
    assert one.keys() == other.keys()
    worst = max(float((one[key] - other[key]).abs().max()) for key in one)
    assert worst <= 1e-6
    records = [
        json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records if "train/total_loss" in r] == list(range(1, 21))
    whole, killed = (witnessed(tmp_path, name) for name in ("undisturbed", "killed"))
    assert killed == whole
    assert list(killed) == list(range(1, 21))
    in_order = [i for step in killed for i in killed[step]]
    epoch = max(in_order) + 1
    assert epoch < len(in_order)
    assert sorted(in_order[:epoch]) == list(range(epoch))


@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_to_one_process_or_all_saves_and_ends_all(to_all: bool, tmp_path: Path) -> None:
    """Fails if one process stops alone, the save is incomplete, or the exit code is wrong.

    A scheduler signals every process, including workers, and the launcher forwards the signal.
    """
    write_run(tmp_path, until="100000 steps")
    workers = ["--set", "data_text.num_workers=2"]
    launcher = start(tmp_path, 2, *NEXUS_RUN, "tiny.yaml", "--out", "run", *workers)
    wait_for(lambda: lines(tmp_path / "run") >= 3, launcher)
    rank = process_of(launcher, rank=1)
    if to_all:
        os.killpg(rank, signal.SIGTERM)  # the launcher starts each in its own group
        launcher.send_signal(signal.SIGTERM)
    else:
        os.kill(rank, signal.SIGTERM)
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "SIGTERM")
    assert to_all or "exitcode  : 143" in output, output
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{summary['steps']:08d}"
    assert (saved[-1] / "manifest.json").exists()


def test_a_signal_within_an_evaluation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """Fails if evaluating processes do not save within a scheduler's grace period."""
    write_run(tmp_path, until="100 steps", eval_every="1 steps")
    (tmp_path / "valid.txt").write_text("a line of held-out text\n" * 40_000)
    sets = ["--set", "data_text.valid=valid.txt", "--set", "data_text.eval_batch_size=2"]
    launcher = start(tmp_path, 2, *NEXUS_RUN, "tiny.yaml", "--out", "run", *sets)
    wait_for(lambda: lines(tmp_path / "run") >= 1, launcher)  # of the step before the evaluation
    os.kill(process_of(launcher, rank=1), signal.SIGTERM)
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["steps"]) == ("stopped", "SIGTERM", 1)
    assert "val/loss" not in summary["metrics"], output
    assert (tmp_path / "run/checkpoints/step-00000001/manifest.json").exists()


def test_a_restart_before_the_first_save_resumes_from_the_named_checkpoint(tmp_path: Path) -> None:
    """Fails if a run resumed from another run restarts from scratch when a process dies early."""
    write_run(tmp_path)
    together(2, command, tmp_path, ["tiny.yaml", "--out", "base"])
    sets = ["--set", "until=100 steps", "--set", "checkpoint.every=1000 steps"]
    named = ["--resume", "base/checkpoints/final", "--out", "new", *sets]
    launcher = start(tmp_path, 2, "--max-restarts", "1", *NEXUS_RUN, "tiny.yaml", *named)
    wait_for(lambda: lines(tmp_path / "new") >= 2, launcher)
    os.kill(process_of(launcher, rank=1), signal.SIGKILL)
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    assert launcher.returncode == 0, output
    assert output.count("resumed at step 20") == 2
    steps = [json.loads(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if "train/total_loss" in r] == list(range(21, 101))


LAST_LOOK = """
import atexit
import os
from pathlib import Path
from nexus_core import Plugin, PluginConfig


def look():
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    os.write(1, f"threads at the end: {sorted(threads)}\\n".encode())  # in one piece


atexit.register(look)


class LastLookPlugin(Plugin[PluginConfig]):
    \"\"\"Tells which threads the interpreter ends with.\"\"\"
"""


def test_no_thread_of_the_process_group_lives_on_into_the_end(tmp_path: Path) -> None:
    """Fails if the interpreter exits while threads are alive, which can abort it."""
    write_run(tmp_path, until="6 steps")
    with fake_distribution(
        "last_look", {"last_look": "last_look:LastLookPlugin"}, modules={"last_look": LAST_LOOK}
    ) as package:
        options = [*NEXUS_RUN, "tiny.yaml", "--out", "run", "--plugins", "last_look"]
        launcher = start(tmp_path, 2, *options, environment={"PYTHONPATH": str(package)})
        output = launcher.communicate(timeout=PATIENCE_S)[0]
    assert output.count("threads at the end: ") == 2, output
    assert "gloo" not in output, output


def test_processes_that_were_started_unlike_end_with_one_error(tmp_path: Path) -> None:
    """Fails if a run starts with two learning rates, or each process prints the error."""
    write_run(tmp_path)
    (tmp_path / "unlike.sh").write_text(
        'NEXUS_OPTIM_ADAMW__LR="0.00$((RANK + 1))" exec '
        f"{sys.executable} -m nexus_core.cli.run tiny.yaml --out run\n"
    )
    launcher = start(tmp_path, 2, "--no-python", "sh", "unlike.sh")
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    assert output.count("were started differently") == 1, output
    assert "optim_adamw.lr is 0.002 in rank 1, 0.001 in rank 0" in output
    assert "exitcode  : 2" in output
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_all_is_told_once(tmp_path: Path) -> None:
    """Fails if every process prints an error that all of them share, before or after joining.

    First a setting is wrong, so nobody joins; then the model cannot be sharded as configured.
    """
    write_run(tmp_path)
    for extra, message in (
        (["--set", "clip.max_norm=-1"], "clip.max_norm"),
        (["--plugins", "no:ddp,fsdp", "--set", "fsdp.match=['*.nothing']"], "matches no module"),
    ):
        options = [*NEXUS_RUN, "tiny.yaml", "--out", "run", *extra]
        output = start(tmp_path, 2, *options).communicate(timeout=PATIENCE_S)[0]
        assert output.count(message) == 1, output
        assert "exitcode  : 2" in output
        assert "error in rank" not in output
        assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_is_told_by_it(tmp_path: Path) -> None:
    """Fails if a process other than rank 0, such as one without the file, ends silently."""
    write_run(tmp_path)
    (tmp_path / "tiny.yaml").rename(tmp_path / "0.yaml")
    command = f"exec {sys.executable} -m nexus_core.cli.run $RANK.yaml --out run\n"
    (tmp_path / "unlike.sh").write_text(command)
    launcher = start(tmp_path, 2, "--no-python", "sh", "unlike.sh")
    output = launcher.communicate(timeout=PATIENCE_S)[0]
    assert output.count("error in rank 1: ") == 1, output
    assert "1.yaml" in output
    assert "exitcode  : 2" in output


def test_several_processes_without_a_plugin_for_it_are_refused(tmp_path: Path) -> None:
    """Fails if each process trains its own model, or each prints the error."""
    write_run(tmp_path)
    arguments = [*NEXUS_RUN, "tiny.yaml", "--plugins", "no:ddp", "--out", "run"]
    output = start(tmp_path, 2, *arguments).communicate(timeout=PATIENCE_S)[0]
    assert output.count("slot 'processes'") == 1, output
    assert "exitcode  : 2" in output


def test_a_process_that_hangs_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    """Fails if the others wait forever, or do not report who waited where."""
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
    """Whether rank 0 has recorded that the run failed."""
    path = out / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "failed"


def test_the_benchmark_times_both_and_they_do_the_same_work(tmp_path: Path) -> None:
    """Fails if a case no longer runs or ends with other weights; the ratio is not checked here."""
    path = tmp_path / "times.json"
    command = [sys.executable, "-m", "benchmarks.distributed", "--rounds", "1"]
    command += ["--problems", "small", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    times = json.loads(path.read_text())["small 2"] if path.exists() else done.stderr
    assert times.keys() == {"alone", "ours", "tree", "cells", "by hand", "over", "speed"}
    assert min(min(times[case]) for case in ("alone", "ours", "tree", "cells", "by hand")) > 0
