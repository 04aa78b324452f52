"""Branches: unchanged parts stay bitwise the same, and both folders record the relation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from nexus_core.cli.lineage import changes, read_lineage
from nexus_core.cli.run import main as nexus_run

pytestmark = pytest.mark.filterwarnings("ignore:resuming")

WORLD = '''
import torch
from nexus_core import Loss, LossConfig, ResumableLoader, RunData, hookimpl


class Rows:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"x": torch.full((3,), index / 64), "row": torch.tensor(index)}


class Net(torch.nn.Module):
    """Writes down which rows it saw, what dropout left, and noise of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)

    def forward(self, batch):
        dropped = self.dropout(torch.ones(8))
        self.seen = [batch["row"].tolist(), dropped.tolist(), torch.randn(2).tolist()]
        return self.inner(batch["x"]) * dropped.sum()


class WorldPlugin(Loss[LossConfig]):
    """A run in one file."""

    @hookimpl
    def make_data(self, engine):
        return RunData(ResumableLoader(Rows(), 4, seed=engine.seed))

    @hookimpl
    def make_model(self):
        return Net()

    @hookimpl
    def forward(self, engine, batch):
        return engine.model(batch)

    @hookimpl
    def on_step(self, engine):
        with (engine.out / "seen.jsonl").open("a") as file:
            file.write(f"[{engine.state.step}, {engine.model.seen}]\\n")

    def units(self, batch):
        return float(len(batch["x"]))

    def loss(self, batch, output):
        return output.square().sum()
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 12 steps in `whole`, saved every 4."""
    folder = tmp_path_factory.mktemp("branches")
    (folder / "world.py").write_text(WORLD)
    config: dict[str, Any] = {
        "until": "12 steps",
        "seed": 3,
        "log_every": "2 steps",
        "plugins": {
            "./world.py": {},
            "optim_adamw": {"lr": 1e-2},
            "checkpoint": {"every": "4 steps", "best": None},
            "jsonl": {},
        },
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = run(str(folder / "my.yaml"), "--out", str(folder / "whole"))
    assert done.exit_code == 0, done.output
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_run, arguments)


def seen(out: Path) -> dict[int, list[Any]]:
    return dict(map(json.loads, (out / "seen.jsonl").read_text().splitlines()))


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def test_a_branch_without_a_change_has_the_bits_of_the_run_it_left(world: Path) -> None:
    whole, out = world / "whole", world / "same"
    done = run("branch", f"{whole}@4", "--out", str(out), "--trust")
    assert done.exit_code == 0, done.output
    for part in ("model", "optimizer", "state"):
        one, other = (
            load_file(folder / f"checkpoints/step-00000012/{part}.safetensors")
            for folder in (whole, out)
        )
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
    assert metrics(out) == [line for line in metrics(whole) if line["step"] > 4]
    assert read_lineage(out).parent is not None
    assert read_lineage(out).parent.changes == {}


def test_a_branch_with_another_rate_sees_the_same_rows_dropout_and_noise(world: Path) -> None:
    whole, out = world / "whole", world / "faster"
    done = run("branch", f"{whole}@8", "-s", "lr=0.05", "--out", str(out), "--trust")
    assert done.exit_code == 0, done.output
    assert "optim_adamw.lr: 0.01 -> 0.05" in done.output
    assert seen(out) == {step: what for step, what in seen(whole).items() if step > 8}
    assert [line["train/world_loss"] for line in metrics(out)] != [
        line["train/world_loss"] for line in metrics(whole) if line["step"] > 8
    ]
    parent = read_lineage(out).parent
    assert parent is not None
    assert (parent.run, parent.step) == (str(whole), 8)
    assert parent.source == "checkpoints/step-00000008"
    assert parent.changes == {"optim_adamw.lr": (0.01, 0.05)}
    assert str(out) in [branch.run for branch in read_lineage(whole).branches]


def test_the_newest_checkpoint_is_branched_and_longer_runs_go_on(world: Path) -> None:
    out = world / "longer"
    done = run("branch", str(world / "whole"), "-s", "until=14", "--out", str(out), "--trust")
    assert done.exit_code == 0, done.output
    assert [*seen(out)] == [13, 14]
    again = run("branch", f"{out}@final", "-s", "until=15", "--out", f"{out}2", "--trust")
    assert again.exit_code == 0, again.output
    assert read_lineage(out).parent is not None
    assert [branch.step for branch in read_lineage(out).branches] == [14]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["whole@5"], "has no checkpoint of step 5; it has: 4, 8, 12"),
        (["absent@5"], "there is no run in"),
        (["whole@better"], "has no checkpoint 'better'"),
        (["whole@8"], "add --trust"),
        (["whole@8", "--trust", "-s", "seed=4"], "seed is 4, was 3"),
        (["whole@8", "--trust", "--out", "whole"], "already holds a run"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    world: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    before = {path.name for path in world.iterdir()}, (world / "whole/lineage.jsonl").exists()
    options = arguments if "--out" in arguments else [*arguments, "--out", "none"]
    done = run("branch", *options)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert ({p.name for p in world.iterdir()}, (world / "whole/lineage.jsonl").exists()) == before


def test_changes_are_by_key_and_whole_plugins() -> None:
    before = {"seed": 1, "out": "a", "plugins": {"dew": {"size": 1, "far": 2}, "fog": {}}}
    after = {"seed": 2, "out": "b", "plugins": {"dew": {"size": 3, "far": 2}, "sun": {"up": 1}}}
    assert changes(before, after) == {
        "seed": (1, 2), "dew.size": (1, 3), "fog": ({}, None), "sun": (None, {"up": 1})
    }  # fmt: skip
