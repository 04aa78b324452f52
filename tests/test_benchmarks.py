"""The benchmarks run, and write the documented results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OURS = {"bare", "tutorial", "nexus"}
PEERS = {"lightning", "ignite", "accelerate", "transformers"}


@pytest.mark.slow
def test_overhead_times_every_case_that_can_run_and_names_the_others(tmp_path: Path) -> None:
    """Fails if a case no longer trains, ends with other weights than the loop, or is missing."""
    path = tmp_path / "overhead.json"
    command = [sys.executable, "-m", "benchmarks.overhead", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text(encoding="utf-8"))
    timed, skipped = results["cases"], results["skipped"]
    assert timed.keys() >= OURS
    assert timed.keys() | skipped.keys() == OURS | PEERS
    assert not timed.keys() & skipped.keys()
    assert all("pip install" in reason for reason in skipped.values())
    for name, row in timed.items():
        spread = row["microseconds"]
        assert 0 < spread["least"] <= spread["median"] <= spread["most"], name
        by_round = results["microseconds_by_round"]
        assert len(by_round[name]) == results["rounds"], name
        over = [mine - base for mine, base in zip(by_round[name], by_round["bare"], strict=True)]
        assert math.isclose(row["over_bare"]["most"], max(over)), name
        assert name in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("model", "trainer"), [("nexus", "bare"), ("backbone", "engine")])
def test_the_benchmark_of_accelerators_runs_on_the_cpu(
    model: str, trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a case no longer trains, so that it would fail on the first machine with a GPU."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu

    case = gpu.Case(model, trainer)
    assert case.missing == ""
    found = gpu.figures(case, gpu.SIZES["tiny"], torch.device("cpu"), tmp_path)
    assert found.tokens_per_second == pytest.approx(1000 * 2 * 32 / found.milliseconds)
    assert 0 < found.mfu < 1
    assert found.parameters > 10_000
    assert found.waits_per_step is None, "counted on CUDA alone"
    assert gpu.Case("gpt2", "lightning") in gpu.CASES


@pytest.mark.slow
def test_overhead_refuses_a_case_that_does_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a case could win by skipping clipping, the schedule or steps."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import overhead

    def idle(run: overhead.Run) -> None:
        run.losses.extend(0.0 for _ in run.feed)

    with pytest.raises(SystemExit, match="idle ended .* not the same work"):
        overhead.measure({"bare": overhead.bare(), "idle": idle}, rounds=1, steps=10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fine_tuning_agrees_with_a_loop_by_hand(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if a side no longer trains, or differs (or agrees) where the docs say otherwise."""
    pytest.importorskip("transformers", reason="the benchmark trains a model of transformers")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    from benchmarks import agreement

    found = [f for layout in agreement.LAYOUTS for f in agreement.differences(kind, layout, 3, 2)]
    differing = {f.side for f in found if max(f.loss, f.weight) > 2e-6}
    known = {"SFTTrainer, wrapped", *(("Trainer", "SFTTrainer") if kind == "gpt2" else ())}
    assert {"by hand in float32", "ours"} <= {f.side for f in found} - differing
    assert differing == {side for side in known if agreement.installed(side)}
