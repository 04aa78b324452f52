"""`nexus-run compare`: the interval is valid at any time, and pairs are valid."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as some
from scipy import integrate, stats

from nexus_core import ConfigError
from nexus_core.cli.compare.arms import read_arms
from nexus_core.cli.compare.confidence import SCALE, Estimate, estimate, pairs_needed, radius
from nexus_core.cli.compare.pairs import Pair, pair_up
from nexus_core.cli.lineage import read_lineage
from nexus_core.cli.records import Run
from nexus_core.cli.run import main
from written import write_run

# -- the interval


@pytest.mark.parametrize(("n", "confidence"), [(4, 0.95), (5, 0.9), (30, 0.95)])
def test_at_the_edge_the_mixture_of_likelihood_ratios_is_what_ville_allows(
    n: int, confidence: float
) -> None:
    t = radius(n, confidence) * math.sqrt(n)

    def mixed(effect: float) -> float:
        density = stats.nct.pdf(t, n - 1, math.sqrt(n) * effect)
        return float(density * stats.norm.pdf(effect, 0, SCALE))

    ratio = integrate.quad(mixed, -15, 15, points=[0, t / math.sqrt(n)], limit=200)[0]
    assert ratio / stats.t.pdf(t, n - 1) == pytest.approx(1 / (1 - confidence), rel=1e-6)


def test_the_interval_holds_at_all_looks_together() -> None:
    """Checked after each of 80 differences; a t-test at 5% fails in a third of the sequences."""
    drawn = np.random.default_rng(0).normal(0.3, 2.0, (2000, 80))
    counts = np.arange(1, 81)
    means = drawn.cumsum(1) / counts
    squares = (drawn**2).cumsum(1) - counts * means**2
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.abs(means - 0.3) / np.sqrt(squares / (counts - 1))
        widths = np.array([radius(int(n), 0.95) for n in counts])
        once = np.array(
            [stats.t.ppf(0.975, n - 1) / math.sqrt(n) if n > 3 else 9e9 for n in counts]
        )
        assert (off > widths).any(1).mean() < 0.05
        assert (off > once).any(1).mean() > 0.2


@given(
    some.lists(some.floats(-5, 5), min_size=4, max_size=12), some.floats(-9, 9), some.floats(0.1, 9)
)
def test_the_interval_moves_and_scales_with_the_differences(
    values: list[float], shift: float, scale: float
) -> None:
    assume(np.std(values) > 1e-3)
    one, other = estimate(values), estimate([shift + scale * value for value in values])
    assert other.low == pytest.approx(shift + scale * one.low, abs=1e-6)
    assert other.high == pytest.approx(shift + scale * one.high, abs=1e-6)


@given(some.floats(0.05, 9), some.integers(2, 30))
def test_the_pairs_needed_are_the_fewest_that_tell(effect: float, have: int) -> None:
    needed = pairs_needed(Estimate(have, effect, 1.0, -1.0, 1.0))
    assert needed is not None
    assert radius(needed, 0.95) < effect
    assert radius(needed - 1, 0.95) >= effect


def test_few_or_equal_differences_claim_nothing() -> None:
    assert not estimate([5.0]).is_different
    assert math.isinf(estimate([5.0, 5.1, 4.9]).high)
    assert estimate([1.0, 1.1, 0.9, 1.0]).is_different
    assert not estimate([0.0] * 9).is_different
    assert pairs_needed(estimate([0.0] * 9)) is None


# -- the pairs


def run_of(path: Path, **given: Any) -> Run:
    return Run(write_run(path, **given), path.name)


def faults(tmp_path: Path, base: dict[str, Any], variant: dict[str, Any]) -> str:
    return "; ".join(
        Pair(run_of(tmp_path / "a", **base), run_of(tmp_path / "b", **variant)).faults()
    )


BATCHES = {"plugins": {"data_text": {"seq_len": 64}, "optim_adamw": {"lr": 0.1}}}
LONGER = {"plugins": {"data_text": {"seq_len": 128}, "optim_adamw": {"lr": 0.2}}}


@pytest.mark.parametrize(
    ("base", "variant", "said"),
    [
        ({}, {}, ""),
        ({}, {"fingerprint": None}, ""),
        ({}, {"settings": {"until": "40 steps"}}, ""),
        ({}, {"fingerprint": "data-2"}, "different data (fingerprint data-2, base data-1)"),
        ({}, {"tokens": 50}, "different tokens: 500 by step 10, the base has 1,000"),
        ({}, {"settings": {"accumulate": 2}}, "accumulate is 2, the base has 1"),
        ({"settings": BATCHES}, {"settings": LONGER}, "data_text.seq_len is 128, the base has 64"),
    ],
)
def test_a_broken_pair_is_called_so(
    tmp_path: Path, base: dict[str, Any], variant: dict[str, Any], said: str
) -> None:
    assert faults(tmp_path, base, variant) == said


def test_partners_have_one_seed_and_branch_point(tmp_path: Path) -> None:
    base = [run_of(tmp_path / f"a{seed}", seed=seed) for seed in (3, 1, 2)]
    variant = [run_of(tmp_path / f"b{seed}", seed=seed) for seed in (2, 3, 9)]
    at = {"run": str(base[0].path), "step": 10, "source": "c", "changes": {}}
    found = pair_up("b", base, variant)
    assert [(p.base.name, p.variant.name) for p in found.pairs] == [("a2", "b2"), ("a3", "b3")]
    assert [run.name for run in found.alone] == ["b9"]
    branches = [run_of(tmp_path / f"branch{n}", seed=3, parent=at) for n in range(2)]
    to_parent = pair_up("branch", base, branches[:1])
    assert [p.base.name for p in to_parent.pairs] == ["a3"]
    to_branch = pair_up("branch", [*base, branches[0]], branches[1:])
    assert [p.base.name for p in to_branch.pairs] == ["branch0"]
    with pytest.raises(ConfigError, match="several runs have the seed 3"):
        pair_up("branches", base, branches)


# -- the command


def compare(*words: str) -> Any:
    return CliRunner().invoke(main, ["compare", *words])


def write_pairs(tmp_path: Path, effect: float, **given: Any) -> tuple[str, str]:
    """Six runs of a base, and six lower by an effect; seeds vary ten times as much."""
    for seed in range(6):
        own = math.sin(seed) + 3
        write_run(tmp_path / f"base/{seed}", (own + 1, own), seed=seed)
        noise = 0.01 * math.cos(7 * seed)
        last = own + effect + noise
        write_run(tmp_path / f"variant/{seed}", (last + 1, last), seed=seed, **given)
    return str(tmp_path / "base"), str(tmp_path / "variant")


def test_an_effect_far_below_the_scatter_of_seeds_is_found(tmp_path: Path) -> None:
    base, variant = write_pairs(tmp_path, -0.1)
    result = compare(base, variant, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert re.search(
        r"6 +3\.\d+ +2\.\d+ +-0\.\d+ +\[-0\.\d+, -0\.\d+\] +lower +enough", result.output
    )
    assert "BROKEN" not in result.output
    page = (tmp_path / "out/compare.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=\"(?!#)", page), "the page needs nothing else"
    assert '<meta name="viewport"' in page
    assert (tmp_path / "out/compare.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((tmp_path / "out/compare.json").read_text())
    (row,) = written["variants"][0]["results"]
    assert row["variance_saved"] > 50
    assert row["verdict"] == "lower"


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    base, variant = write_pairs(tmp_path, 0.0)
    said = compare(base, variant, base + "/../base/0", "--json", "--out", str(tmp_path / "out"))
    assert said.exit_code == 0, said.output
    one, other = json.loads(said.output)["variants"]
    assert one["results"][0]["verdict"] == "no clear difference"
    assert one["results"][0]["pairs_needed"] > 6
    assert other["results"][0]["verdict"] == "the same"


def test_other_tokens_are_said_on_screen_and_page(tmp_path: Path) -> None:
    base, variant = write_pairs(tmp_path, -0.1, tokens=50)
    result = compare(base, variant, "--out", str(tmp_path / "out"))
    assert "BROKEN PAIRING: different tokens: 500 by step 10" in result.output
    assert "the pairs do not match" in (tmp_path / "out/compare.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.here", "a=1"], "is not a run folder, config file or preset"),
        (["quickstart", "optim"], "a change is KEY=VALUE"),
        (["quickstart", "until=5 steps", "until=5 steps"], "appears twice"),
        (["quickstart", "seed=5"], "--seed"),
        (["quickstart", "a: 'open"], "cannot be read"),
        (["quickstart", "no_such.key=5"], "no_such"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_error(
    words: list[str], said: str, tmp_path: Path
) -> None:
    result = compare(*words, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.glob("out/*/seed-*"))


def test_runs_without_a_common_seed_are_no_pairs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2)
    result = compare(str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "the base has the seeds 1, the variant 2" in result.output.replace("\n", " ")


def test_a_variant_is_the_base_with_changes() -> None:
    base, plain, named = read_arms(
        "quickstart", ["lr=1e-3 no:clip", "small: until='9 steps' +ema"], "mfu", ("seed_x=1",)
    )
    assert base.recipe is not None
    assert plain.recipe is not None
    assert named.recipe is not None
    assert plain.name == "lr=1e-3 no:clip"
    assert (plain.recipe.plugins, plain.recipe.sets) == ("mfu,no:clip", ("seed_x=1", "lr=1e-3"))
    assert (named.name, named.folder) == ("small", "small")
    assert (named.recipe.plugins, named.recipe.sets[-1]) == ("mfu,ema", "until=9 steps")


def test_names_that_differ_late_are_two_variants() -> None:
    """Fails if folders whose paths share 80 characters are confused."""
    words = [f"lr=1e-3 {'a' * 90}.x={number}" for number in range(2)]
    folders = {arm.folder for arm in read_arms("quickstart", words)}
    assert len(folders) == 3
    assert max(map(len, folders)) == 80


TINY = """
until: 8 steps
log_every: 4 steps
eval_every: 4 steps
plugins:
  data_text: {train: corpus.txt, seq_len: 32, batch_size: 2}
  model_nexus: {d_model: 16, ssm_n_layers: 1, ssm_head_dim: 16, dropout: 0.1}
  loss_lm: {}
  optim_adamw: {lr: 1.0e-2}
  checkpoint: {every: 2 steps}
  jsonl: {}
"""


def write_tiny(folder: Path) -> None:
    (folder / "corpus.txt").write_text(
        "".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600))
    )
    (folder / "tiny.yaml").write_text(TINY)


@pytest.mark.slow
def test_a_killed_comparison_keeps_its_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal runs are bitwise equal, and existing runs are not trained again."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    words = ["compare", "tiny.yaml", "same: until='8 steps'", "faster: lr=0.02", "--pairs", "2",
             "--jobs", "2", "--out", "out", "--json"]  # fmt: skip
    command = [sys.executable, "-m", "nexus_core.cli.run", *words]
    first = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    done = tmp_path / "out/tiny.yaml/seed-0/summary.json"
    while first.poll() is None and not done.exists():
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = done.read_bytes()
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = json.loads(said.stdout)
    assert done.read_bytes() == kept, "was not trained again"
    same, faster = (variant["results"][0] for variant in result["variants"])
    assert (same["verdict"], same["pairs"]) == ("the same", 2)
    assert faster["difference"] != 0
    assert result["variants"][1]["changes"] == {"optim_adamw.lr": [0.01, 0.02]}
    changed = compare(*words[1:], "--set", "until=9 steps")
    assert changed.exit_code == 2
    assert "holds runs of another" in changed.output
    branched = compare("out/tiny.yaml@4", "same: seq_len=32", "faster: lr=0.02", "--out", "from-4")
    assert branched.exit_code == 0, branched.output
    same, faster = json.loads(Path("from-4/compare.json").read_text())["variants"]
    assert (same["results"][0]["verdict"], same["results"][0]["pairs"]) == ("the same", 2)
    assert faster["changes"] == {"optim_adamw.lr": [0.01, 0.02]}
    assert faster["results"][0]["difference"] != 0
    parents = [
        read_lineage(path.parent).parent for path in Path("from-4/faster").glob("*/data.json")
    ]
    assert [parent and parent.step for parent in parents] == [4, 4]
