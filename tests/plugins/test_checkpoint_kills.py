"""Killed processes: a short version of `python -m benchmarks.crash`, and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crash import crash
from nexus_core import ConfigError, Plugin, PluginConfig, ResumableLoader, hookimpl
from nexus_core.cli.notes import witness
from nexus_core.cli.verify_resume import compare_runs, verify_resume
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.jsonl import JsonlPlugin
from tiny import Regression, tiny_engine


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Fails if a SIGKILL, sometimes during a save, changes a bit, a log line or a sample."""
    report = crash(3, tmp_path / "crash", seed=1)
    assert report.differences == []
    assert report.kills == 3
    certificate = json.loads((tmp_path / "crash" / "certificate.json").read_text())
    assert certificate["holds"] is True
    assert certificate["kills"] == 3


@pytest.mark.slow
def test_a_run_that_never_resumed_gets_no_certificate(tmp_path: Path) -> None:
    """Fails if kills without a checkpoint count as proof of exact resume.

    No save can be caught here, so it also fails if waiting for one lets the run end unkilled.
    """
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    sets = [
        f"data_text.train={corpus}", "data_text.seq_len=32", "data_text.batch_size=2",
        "model_nexus.d_model=16", "model_nexus.ssm_n_layers=1", "model_nexus.ssm_head_dim=16",
        "until=30 steps", "lr_cosine.warmup=2 steps",
    ]  # fmt: skip
    report = verify_resume(
        "quickstart", tmp_path / "out", kills=4, plugins="no:checkpoint", sets=sets, threads=1
    )
    assert report.kills == 3  # the last one waits for a checkpoint
    assert not report.holds
    assert "never resumed from a checkpoint" in report.differences[-1]
    assert json.loads((tmp_path / "out/certificate.json").read_text())["holds"] is False


OWN = '''
import torch
from nexus_core import Loss, LossConfig, Plugin, PluginConfig, ResumableLoader, RunData, hookimpl


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"x": torch.full((3,), index / 64)}


class WorldPlugin(Loss[LossConfig]):
    """A run in one file; its rows are read by a worker."""

    @hookimpl
    def make_data(self, engine):
        return RunData(ResumableLoader(Rows(), 4, seed=engine.seed, num_workers=1))

    @hookimpl
    def make_model(self):
        return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.2))

    @hookimpl
    def make_optimizer(self, engine):
        return torch.optim.AdamW(engine.model.parameters(), lr=0.01)

    @hookimpl
    def forward(self, engine, batch):
        return engine.model(batch["x"])

    def units(self, batch):
        return float(len(batch["x"]))

    def loss(self, batch, output):
        return output.square().sum()
'''


@pytest.mark.slow
def test_a_run_of_a_users_own_file_is_verified_from_another_folder(tmp_path: Path) -> None:
    """Fails if the killed processes, or their workers, do not find the file."""
    (tmp_path / "world.py").write_text(OWN)
    (tmp_path / "my.yaml").write_text(
        "until: 40 steps\nplugins:\n  ./world.py: {}\n  checkpoint: {every: 4 steps, best: null}\n"
    )
    report = verify_resume(str(tmp_path / "my.yaml"), tmp_path / "out", kills=2, threads=1)
    assert report.differences == []
    assert report.kills == 2
    assert (tmp_path / "out/killed/plugins/world.py").read_text() == OWN


class ForgetfulPlugin(Plugin[PluginConfig]):
    """Changes the weights by a value that it does not save."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    @hookimpl
    def on_step(self, engine: Any) -> None:
        self.steps += 1
        next(engine.model.parameters()).data.add_(1e-3 * self.steps)


@pytest.mark.parametrize("forgetful", [False, True])
def test_the_first_difference_is_named_with_its_state(forgetful: bool, tmp_path: Path) -> None:
    """Fails if a plugin that loses its state passes, or another one is blamed."""

    def run(out: Path, until: int) -> None:
        extra = [ForgetfulPlugin()] if forgetful else []
        engine = tiny_engine(
            CheckpointPlugin(every=4), JsonlPlugin(), witness(), *extra, dropout=0.2, out=out
        )
        engine.resume()
        loader = ResumableLoader(Regression(), 4, seed=1)
        for state in engine.steps(loader, until=12):
            if state.step == until:
                break

    run(tmp_path / "whole", 12)
    for stop in (6, 9, 12):
        run(tmp_path / "cut", stop)
    found = compare_runs(tmp_path / "whole", tmp_path / "cut")
    if forgetful:
        assert found[0] == "step 5: weights (hidden)"
        assert found[1].startswith("metrics.jsonl, line 2: train/squared_loss")
    else:
        assert found == []


class LeavingPlugin(Plugin[PluginConfig]):
    """Stops the run immediately during an evaluation, like a SIGTERM."""

    only_watches = True

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    @hookimpl
    def forward(self, engine: Any, step: Any) -> None:
        if step is None and engine.state.step == self.step:
            engine.stop("the machine is wanted", at_once=True)


def test_a_step_whose_evaluation_was_put_off_is_noted_once_and_whole(tmp_path: Path) -> None:
    """Fails if an evaluation postponed to the next session counts as a difference."""

    def live(out: Path, leaves: int, until: int) -> None:
        plugins = [CheckpointPlugin(every=4), JsonlPlugin(), witness(), LeavingPlugin(leaves)]
        engine = tiny_engine(*plugins, dropout=0.2, out=out)
        engine.resume()
        loader = ResumableLoader(Regression(), 4, seed=1)
        valid = [batch for batch, _ in zip(loader.batches(0), range(3), strict=False)]
        for state in engine.steps(loader, until=12, eval_data=valid, eval_every=3):
            if state.step == until:
                break

    live(tmp_path / "whole", leaves=0, until=12)
    for leaves, until in ((6, 12), (0, 7), (0, 12)):  # postponed; made, and killed; made again
        live(tmp_path / "cut", leaves, until)
    assert compare_runs(tmp_path / "whole", tmp_path / "cut") == []


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    """Fails if a verification writes to an existing run."""
    with pytest.raises(ConfigError, match="--out DIR"):
        verify_resume("quickstart", tmp_path)
