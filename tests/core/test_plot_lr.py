"""`nexus-run --plot-lr`: the plot is what a run then does, and nothing is trained for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nexus_core import ConfigError, Engine
from nexus_core.cli import chart
from nexus_core.cli.plot_lr import plan_lr
from nexus_core.cli.run import main
from nexus_core.plan import load
from tests.distributed.processes import said_by

BASIS: dict[str, dict[str, Any]] = {
    "data_text": {"seq_len": 16, "batch_size": 2},
    "model_nexus": {"d_model": 8, "ssm_n_layers": 1, "ssm_head_dim": 8},
    "loss_lm": {},
    "optim_adamw": {"lr": 1e-2, "groups": [{"match": "*.embedding*", "lr": 1e-3}]},
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {i}: {'ab' * (i % 7)}\n" for i in range(60)))
    return path


def engine_of(corpus: Path, name: str, settings: dict[str, Any], **more: dict[str, Any]) -> Engine:
    blocks = {**BASIS, name: settings, **more}
    blocks["data_text"] = {**blocks["data_text"], "train": str(corpus)}
    plugins = [load(name)(**block) for name, block in blocks.items()]
    return Engine(plugins=plugins, seed=1, accumulate=2, device="cpu")


@pytest.mark.parametrize(
    ("schedule", "settings", "until"),
    [
        ("lr_cosine", {"warmup": "4 steps", "min_lr": 1e-4}, "12 steps"),
        ("lr_linear", {"warmup": "100 tokens", "min_lr": 1e-4}, "700 tokens"),
        ("lr_wsd", {"warmup": "3 steps", "decay": "4 steps"}, "12 steps"),
        ("lr_cosine", {"warmup": "0.1 epochs", "min_lr": 0.0}, "0.5 epochs"),
        ("lr_rsqrt", {"warmup": "3 steps"}, "20 samples"),
        ("lr_torch", {"scheduler": "StepLR", "settings": {"step_size": 3}}, "10 steps"),
        ("lr_finder", {"steps": 8}, "8 steps"),
    ],
)
def test_the_plan_is_what_the_run_does(
    corpus: Path, schedule: str, settings: dict[str, Any], until: str
) -> None:
    """Fails if plot and training disagree at any step or parameter group."""
    assert_as_planned(
        engine_of(corpus, schedule, settings), engine_of(corpus, schedule, settings), until
    )


RULES: dict[str, list[dict[str, Any]]] = {
    "all groups, beside a schedule": [
        {"target": "optimizer.lr", "start": 1e-3, "end": 1e-2, "over": "6 steps"}
    ],
    "one group": [
        {"target": "optimizer.*.embedding*.others.lr", "start": 1e-3, "end": 1e-2,
         "over": "0.2 epochs"},
    ],
    "by tokens, in a batch of another size": [
        {"target": "engine.accumulate", "start": 3, "end": 3},
        {"target": "optimizer.lr", "start": 0.1, "end": 0.01, "over": "300 tokens",
         "begin": "100 tokens", "shape": "exponential"},
    ],
    "beside a number that time moves": [
        {"target": "loss_lm.weight", "start": 0.5, "end": 1.0, "over": "1 h"},
        {"target": "optimizer.lr", "start": 0.1, "end": 0.01, "over": "5 steps"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_base_learning_rates_that_a_rule_moves_are_in_the_plan(corpus: Path, case: str) -> None:
    """Fails if the plot ignores the plugin `schedule`, or is a step late."""
    schedule = {"rules": RULES[case]}
    planned, run = (
        engine_of(corpus, "lr_cosine", {"warmup": "4 steps"}, schedule=schedule) for _ in range(2)
    )
    assert_as_planned(planned, run, "700 tokens" if "tokens" in case else "9 steps")


@pytest.mark.parametrize(
    ("settings", "until", "said"),
    [
        ({"warmup": "4 steps"}, "12 steps", ""),
        (
            {"warmup": "100 tokens"},
            "12 steps",
            "assuming every step covers 64 tokens, like the first",
        ),
        (
            {"warmup": "4 steps"},
            "60 samples",
            "assuming every step covers 4 samples, like the first",
        ),
    ],
)
def test_what_the_plan_cannot_know_it_says(
    corpus: Path, settings: dict[str, Any], until: str, said: str
) -> None:
    """Fails if a plan in tokens states no assumption although the batch grows."""
    rules = [{"target": "engine.accumulate", "start": 2, "end": 4, "over": "100 tokens"}]
    engine = engine_of(corpus, "lr_cosine", settings, schedule={"rules": rules})
    assert plan_lr(engine, until).assumed == said


def assert_as_planned(planned: Engine, run: Engine, until: str) -> None:
    """Check that an engine does what was planned for an identical one."""
    plan = plan_lr(planned, until)
    done: list[list[float]] = []
    stepping = run.hook.optimizer_step

    def noted(**given: Any) -> Any:
        done.append([group["lr"] for group in run.optimizer.param_groups])
        return stepping(**given)

    run.hook.optimizer_step = noted
    run.fit(until=until, eval_data={})
    assert plan.total == len(done)
    assert plan.steps == tuple(range(len(done)))
    for rates, happened in zip(plan.rates.values(), zip(*done, strict=True), strict=True):
        assert rates == pytest.approx(happened)
    assert len(set(plan.rates)) == len(run.optimizer.param_groups) > 1


def test_a_long_run_is_sampled_from_its_first_step_to_its_last(corpus: Path) -> None:
    """Fails if a million steps take a million calls, or the end of the decay is cut off."""
    engine = engine_of(corpus, "lr_cosine", {"warmup": "1000 steps", "min_lr": 1e-5})
    plan = plan_lr(engine, "1M steps", points=50)
    assert len(plan.steps) == 50
    assert plan.steps[0] == 0
    assert plan.steps[-1] == 999_999
    assert next(iter(plan.rates.values()))[-1] == pytest.approx(1e-5, rel=1e-3)


def arguments(corpus: Path, *more: str) -> list[str]:
    sets = {
        "data_text.train": str(corpus), "data_text.seq_len": "16", "data_text.batch_size": "2",
        "model_nexus.d_model": "8", "model_nexus.ssm_n_layers": "1", "until": "30 steps",
        "model_nexus.ssm_head_dim": "8", "lr_cosine.warmup": "5 steps",
    }  # fmt: skip
    return [*more, *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_the_command_draws_and_leaves_no_run(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, with_matplotlib: bool
) -> None:
    """Fails if it trains, needs matplotlib, or does not print the path of the plot."""
    if with_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(chart, "find_spec", lambda _: None)
    monkeypatch.chdir(corpus.parent)
    before = set(Path().iterdir())
    result = CliRunner().invoke(main, arguments(corpus, "--plot-lr"))
    assert result.exit_code == 0, result.output
    assert "over 30 steps" in result.output
    assert "⠀" in result.output
    assert "highest 0.012 at step 5," in result.output
    assert "assuming every step" not in result.output
    picture = Path("runs/quickstart-lr.png")
    assert picture.exists() is with_matplotlib
    expected = str(picture) if with_matplotlib else "pip install 'nexus-trainer[plot]'"
    assert expected in result.output
    made = {path for path in Path().rglob("*") if path.is_file()} - before
    assert made <= {picture}


def test_the_picture_of_a_run_with_a_folder_is_in_it(corpus: Path, tmp_path: Path) -> None:
    """Fails if --out is ignored, or the folder then counts as an existing run."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "mine"
    result = CliRunner().invoke(main, arguments(corpus, "--plot-lr", "--out", str(out)))
    assert result.exit_code == 0, result.output
    assert [path.name for path in out.iterdir()] == ["lr.png"]
    assert (out / "lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_in_a_process_of_its_own(corpus: Path, tmp_path: Path) -> None:
    """Fails if the option only works inside a test."""
    command = Path(sys.executable).with_name("nexus-run")
    said = said_by(command, *arguments(corpus, "--plot-lr"), folder=tmp_path)
    assert "learning rate" in said


@pytest.mark.parametrize(
    ("settings", "until"), [({"warmup": "3 steps"}, "2 min"), ({"warmup": "10 s"}, "9 steps")]
)
def test_what_counts_seconds_is_refused(corpus: Path, settings: dict[str, Any], until: str) -> None:
    """Fails if a plan in seconds is drawn, which is unknowable."""
    with pytest.raises(ConfigError, match="counts seconds"):
        plan_lr(engine_of(corpus, "lr_constant", settings), until)


def test_the_command_says_what_it_takes_for_granted(corpus: Path, tmp_path: Path) -> None:
    """Fails if the plan's assumptions are not printed."""
    tokens = arguments(corpus, "--plot-lr", "--out", str(tmp_path / "o"))
    result = CliRunner().invoke(main, [*tokens, "--set", "until=900 tokens"])
    assert result.exit_code == 0, result.output
    assert "\nassuming every step covers 32 tokens, like the first\n" in result.output


def test_a_mistake_is_one_line(corpus: Path) -> None:
    """Fails if the user gets a traceback."""
    wrong = [*arguments(corpus, "--plot-lr"), "--set", "until=1 min"]
    result = CliRunner().invoke(main, wrong)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
