"""Checkpoints of whole runs: exact resume, names, retention, damage, attacks, crashes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from nexus_core import (
    CheckpointError,
    Engine,
    Plugin,
    PluginConfig,
    ResumableLoader,
    RunError,
    StateDict,
    hookimpl,
)
from nexus_plugins.checkpoint import CheckpointPlugin, lock, run_lock
from tiny import Net, RecorderPlugin, Regression, tiny_engine

FILES = {
    "lock.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    "state.safetensors",
}  # fmt: skip


class NotesPlugin(Plugin[PluginConfig]):
    """Has a state of every type: numbers, text, a tensor, and non-string keys."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Any] = {"ids": [], 7: torch.zeros(3, dtype=torch.bfloat16)}

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.seen["ids"].append([engine.state.step, float("inf")])
        self.seen[7] += 1

    def state_dict(self) -> StateDict:
        return {"seen": self.seen}

    def load_state_dict(self, state: StateDict) -> None:
        self.seen = state["seen"]  # type: ignore[assignment]


def engine_in(out: Path, *plugins: Plugin[Any], accumulate: int = 1, **settings: Any) -> Engine:
    settings = {"every": "3 steps", **settings}
    return tiny_engine(
        CheckpointPlugin(**settings), *plugins, dropout=0.3, out=out, accumulate=accumulate
    )


def train(engine: Engine, until: int, **options: Any) -> Engine:
    loader = ResumableLoader(Regression(), 4, seed=1)
    held = ResumableLoader(Regression(), 8, shuffle=False)
    options = {"eval_data": held, "eval_every": "4 steps", **options}
    engine.fit(loader, until=until, **options)
    return engine


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flat(item, f"{path}/{index}")
    else:
        yield path, value


def resign(folder: Path) -> None:
    """Update the manifest of a changed checkpoint, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        raw = (folder / name).read_bytes()
        facts.update(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip waiting for the disk: no test cuts the power, and one checks the order of syncs."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize(
    "options", [{}, {"sync": True}, {"every": 1}, {"accumulate": 3}], ids=lambda o: str(o)
)
def test_a_resumed_run_ends_in_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    """Fails if any state is missing from a checkpoint: mid-epoch, with dropout, accumulation."""
    whole = train(engine_in(tmp_path / "whole", NotesPlugin(), **options), 14)
    generator = torch.get_rng_state()
    for stop in (1, 5, 6, 11):
        first = engine_in(tmp_path / str(stop), NotesPlugin(), **options)
        for state in first.steps(ResumableLoader(Regression(), 4, seed=1), until=14):
            if state.step == stop:
                first.stop()
        second = engine_in(tmp_path / str(stop), NotesPlugin(), **options)
        second.resume()
        assert second.state.step == stop
        train(second, 14, eval_every=None)
        for mine, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(mine, theirs), f"stopped at {stop}"
        assert (
            whole.plugins["notes"].state_dict()["seen"]["ids"]
            == second.plugins["notes"].state_dict()["seen"]["ids"]
        )
        assert torch.equal(torch.get_rng_state(), generator), f"stopped at {stop}"


def test_the_whole_state_is_equal_after_a_resume_with_evaluations(tmp_path: Path) -> None:
    """Fails if metrics, generators, optimizer or the best value differ by one bit."""
    logs = [RecorderPlugin(), RecorderPlugin(), RecorderPlugin()]
    whole = train(engine_in(tmp_path / "whole", logs[0], NotesPlugin()), 13)
    torch.manual_seed(99)
    cut = engine_in(tmp_path / "cut", logs[1], NotesPlugin())
    loader = ResumableLoader(Regression(), 4, seed=1)
    held = ResumableLoader(Regression(), 8, shuffle=False)
    for state in cut.steps(loader, until=13, eval_data=held, eval_every="4 steps"):
        if state.step == 7:
            break  # as in a kill, except for pending writes
    random_state_elsewhere()
    second = engine_in(tmp_path / "cut", logs[2], NotesPlugin())
    second.resume("auto")
    assert second.state.step == 6
    train(second, 13)
    assert_same_model_optimizer_plugins(whole, second)
    assert logs[2].lines == [line for line in logs[0].lines if line[0] > 6]


def random_state_elsewhere() -> None:
    random.seed(123)
    torch.manual_seed(123)


def assert_same_model_optimizer_plugins(a: Engine, b: Engine) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    for part in ("model", "optimizer", "plugins", "metrics", "pending"):
        mine, other = dict(flat(ours[part])), dict(flat(theirs[part]))  # type: ignore[literal-required]
        for name, value in mine.items():
            same = value.equal(other[name]) if isinstance(value, Tensor) else value == other[name]
            assert same, f"{part}{name}"


def test_the_generators_go_on_where_they_were(tmp_path: Path) -> None:
    """Fails if the generators of python, numpy or torch restart after a resume."""
    engine = train(engine_in(tmp_path), 3)
    expected = (random.random(), np.random.rand(), torch.rand(2).tolist())
    random_state_elsewhere()
    np.random.seed(5)
    engine_in(tmp_path).resume("final")
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected
    assert engine.state.step == 3


def test_the_folder_holds_what_the_documentation_says(tmp_path: Path) -> None:
    """Fails if the layout changes, or a file cannot be read without this library."""
    engine = engine_in(tmp_path, NotesPlugin())
    engine.config = {"seed": 5, "plugins": {"clip": {"max_norm": 1.0}}}
    train(engine, 6)
    folder = tmp_path / "checkpoints" / "final"
    assert {path.name for path in folder.iterdir()} == {*FILES, "config.yaml"}
    assert (folder / "config.yaml").read_text() == "seed: 5\nplugins:\n  clip:\n    max_norm: 1.0\n"
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, engine.model.state_dict()[name])
    moments = load_file(folder / "optimizer.safetensors")
    assert torch.equal(
        moments["state.0.exp_avg"], engine.optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert load_file(folder / "state.safetensors")["plugins.notes.state.seen.7"].tolist() == [6] * 3
    state = json.loads((folder / "state.json").read_text())
    assert state["train"]["step"] == 6
    lock = json.loads((folder / "lock.json").read_text())
    assert lock["torch"] == torch.__version__
    assert lock["plugins"]["checkpoint"]["config"]["every"] == "3 steps"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        raw = (folder / name).read_bytes()
        assert facts == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def test_best_and_final_are_names_of_whole_checkpoints(tmp_path: Path) -> None:
    """Fails if 'best' is not the evaluation with the best value, or 'final' not the end."""
    record = RecorderPlugin()
    train(engine_in(tmp_path, record, every=100), 12)
    values = {step: line["val/loss"] for step, line in record.lines if "val/loss" in line}
    best = min(values, key=lambda step: values[step])
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    assert (tmp_path / "checkpoints" / "final").resolve().name == "step-00000012"
    resumed = engine_in(tmp_path, RecorderPlugin(), every=100)
    resumed.resume("best")
    assert resumed.state.step == best


def test_a_worse_evaluation_after_a_resume_is_not_called_best(tmp_path: Path) -> None:
    """Fails if the best value is lost on resume."""
    train(engine_in(tmp_path, every=100), 8)
    best = (tmp_path / "checkpoints" / "best").readlink()
    again = engine_in(tmp_path, every=100)
    again.resume()
    for group in again.optimizer.param_groups:
        group["initial_lr"] = group["lr"] = 10.0
    train(again, 16)
    assert (tmp_path / "checkpoints" / "best").readlink() == best


def test_the_mode_max_takes_the_greatest(tmp_path: Path) -> None:
    """Fails if the direction of the metric is ignored."""
    record = RecorderPlugin()
    train(engine_in(tmp_path, record, every=100, mode="max"), 12)
    values = {step: line["val/loss"] for step, line in record.lines if "val/loss" in line}
    best = max(values, key=lambda step: values[step])
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{best:08d}"


def test_a_metric_that_is_never_measured_is_said(tmp_path: Path) -> None:
    """Fails if a misspelt checkpoint.best silently keeps no best checkpoint."""
    with pytest.warns(RuntimeWarning, match="'val/accuracy', which this evaluation does not"):
        train(engine_in(tmp_path, best="val/accuracy"), 4)


def test_retention_keeps_the_last_the_best_and_those_for_good(tmp_path: Path) -> None:
    """Fails if too much or too little is deleted."""
    train(
        engine_in(tmp_path, every=1, keep_last=2, keep_every="5 steps", final=False),
        13,
        eval_every=None,
    )
    best = (tmp_path / "checkpoints" / "best").readlink().name
    assert best == "step-00000013"
    assert checkpoints(tmp_path) == ["best", *(f"step-{n:08d}" for n in (5, 10, 12, 13))]


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_last(tmp_path: Path) -> None:
    """Fails if the newest valid checkpoint is deleted because newer, damaged ones exist."""
    engine = engine_in(tmp_path, every=1, keep_last=2, best=None, final=False)
    for state in engine.steps(ResumableLoader(Regression(), 4), until=5):
        engine.plugins["checkpoint"]._writer.finish()  # type: ignore[attr-defined]
        if state.step in (3, 4):
            (tmp_path / f"checkpoints/step-{state.step:08d}/model.safetensors").write_bytes(b"")
    assert checkpoints(tmp_path) == [f"step-{n:08d}" for n in (2, 3, 4, 5)]


def test_a_run_that_is_stopped_saves_what_it_has(tmp_path: Path) -> None:
    """Fails if a stop between two saves loses the steps since the last one."""
    engine = engine_in(tmp_path, every=100)
    for state in engine.steps(ResumableLoader(Regression(), 4), until=50):
        if state.step == 7:
            engine.stop("SIGTERM")
    assert checkpoints(tmp_path) == ["step-00000007"]


def test_resuming_where_nothing_is_yet_begins_at_the_start(tmp_path: Path) -> None:
    """Fails if --resume auto is an error for a run killed before its first save."""
    expected = train(engine_in(tmp_path / "a", NotesPlugin()), 5)
    engine = engine_in(tmp_path / "b", NotesPlugin())
    engine.resume("auto")
    train(engine, 5)
    assert_same_model_optimizer_plugins(expected, engine)


def test_a_fresh_run_does_not_write_over_an_earlier_one(tmp_path: Path) -> None:
    """Fails if forgetting --resume overwrites a run."""
    train(engine_in(tmp_path), 3)
    with pytest.raises(CheckpointError, match=r"engine\.resume\('auto'\)"):
        train(engine_in(tmp_path), 3)
    assert "step-00000003" in checkpoints(tmp_path)


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    """Fails if a run that went back is later resumed from its abandoned history."""
    train(engine_in(tmp_path, best=None), 9)
    back = engine_in(tmp_path, best=None)
    back.resume(str(tmp_path / "checkpoints" / "step-00000003"))
    with pytest.warns(RuntimeWarning, match="set-aside"):
        train(back, 4)
    assert checkpoints(tmp_path) == [
        "course.json", "final", "set-aside", "step-00000003", "step-00000004",
    ]  # fmt: skip
    assert len(list((tmp_path / "checkpoints" / "set-aside").iterdir())) == 2


@pytest.mark.parametrize("source", ["run", "checkpoints", "step", "link"])
def test_paths_of_runs_and_of_checkpoints_both_work(source: str, tmp_path: Path) -> None:
    """Fails if a new run cannot start from another run's checkpoint."""
    train(engine_in(tmp_path / "old"), 6)
    root = tmp_path / "old" / "checkpoints"
    paths = {
        "run": tmp_path / "old", "checkpoints": root, "step": root / "step-00000006",
        "link": root / "final",
    }  # fmt: skip
    engine = engine_in(tmp_path / "new")
    engine.resume(str(paths[source]))
    assert engine.state.step == 6


@pytest.mark.parametrize("source", ["nowhere", "best", "final", "checkpoints/none"])
def test_a_source_that_is_not_there_is_said(source: str, tmp_path: Path) -> None:
    """Fails if a mistyped path starts a run from scratch."""
    with pytest.raises(CheckpointError, match=r"no checkpoint"):
        engine_in(tmp_path).resume(source)


def damage(folder: Path, name: str, how: str) -> None:
    path = folder / name
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    elif how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif how == "link":
        aside = folder.parent.parent / name
        path.rename(aside)
        path.symlink_to(aside)
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "folder":
        path.unlink()
        path.mkdir()


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, ("touch /tmp/nexus-checkpoint-bomb",)


@pytest.mark.parametrize(
    "how", ["flipped", "cut", "empty", "gone", "pickle", "link", "pipe", "folder"]
)
@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_is_passed_over_and_named(name: str, how: str, tmp_path: Path) -> None:
    """Fails if a flipped bit goes unnoticed, or makes the previous checkpoint unusable."""
    train(engine_in(tmp_path, best=None), 6)
    damage(tmp_path / "checkpoints" / "step-00000006", name, how)
    engine = engine_in(tmp_path, best=None)
    with pytest.warns(RuntimeWarning, match=name):
        engine.resume()
    assert engine.state.step == 3
    with pytest.raises(CheckpointError):
        engine.resume("final")
    assert not Path("/tmp/nexus-checkpoint-bomb").exists()


def test_no_good_checkpoint_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    """Fails if a run whose checkpoints are all damaged silently starts from scratch."""
    train(engine_in(tmp_path, best=None), 6)
    for number in (3, 6):
        damage(tmp_path / "checkpoints" / f"step-{number:08d}", "state.json", "flipped")
    with pytest.raises(CheckpointError, match=r"step-00000006.*step-00000003"):
        engine_in(tmp_path, best=None).resume()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "sub/file", "extra.json"])
def test_a_manifest_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    """Fails if a forged manifest makes the reader open a path outside its folder."""
    folder = whole_checkpoint(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not those of a checkpoint"):
        engine_in(tmp_path).resume(str(folder))


def test_a_name_cannot_lead_elsewhere(tmp_path: Path) -> None:
    """Fails if a forged link makes 'best' point outside the run."""
    elsewhere = whole_checkpoint(tmp_path / "a")
    whole_checkpoint(tmp_path / "b")
    link = tmp_path / "b" / "checkpoints" / "best"
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="points to"):
        engine_in(tmp_path / "b").resume("best")


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s.pop("random"),
        lambda s: s["random"].update(python=[3, [1], None]),
        lambda s: s["random"]["numpy"].__setitem__(2, 100_000),
        lambda s: s["random"]["numpy"].__setitem__(1, []),
        lambda s: s["random"]["numpy"].__setitem__(1, 7),
        lambda s: s["random"]["python"].__setitem__(2, "x"),
        lambda s: s["random"].update(torch={"$tensor": "nothing"}),
        lambda s: s["random"].update(torch=[1, 2]),
        lambda s: s["random"].update(devices=[1]),
        lambda s: s["train"].update(step="6"),
        lambda s: s["train"].update(step=7),
        lambda s: s["train"].update(batch=-1),
        lambda s: s["train"].update(__class__="x"),
        lambda s: s["pending"].update(a=[1, "b"]),
        lambda s: s["metrics"].update(a={}),
        lambda s: s["optimizer"].update(param_groups=[{}]),
        lambda s: s["optimizer"].update(param_groups=[]),
        lambda s: s["optimizer"]["param_groups"][0].update(params=["a", "b", "c", "d"]),
        lambda s: s["model"].pop("head.bias"),
        lambda s: s["model"].update({"head.bias": {"$tensor": "hidden.weight"}}),
        lambda s: s["plugins"].update(checkpoint={"version": 1}),
        lambda s: s["plugins"].update(checkpoint={"version": 1, "state": {"odd": 1}}),
        lambda s: s["plugins"].update(checkpoint={"version": 9, "state": {"value": 1.0}}),
        lambda s: s["plugins"].update(stranger={"version": 1, "state": {"value": 1.0}}),
        lambda s: s.update(format=2),
        lambda s: s.update(metrics={"$eval": "exit()"}),
        lambda s: wrap(s, 100_000),
    ],
)
def test_a_forged_state_is_only_ever_a_checkpoint_error(
    edit: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    """Fails if a state with valid hashes but invalid content is accepted."""
    folder = whole_checkpoint(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    edit(state)
    text = json.dumps(state) if "deep" not in state else '{"a":' * 100_000 + "1" + "}" * 100_000
    (folder / "state.json").write_text(text)
    resign(folder)
    with pytest.raises(CheckpointError):
        engine_in(tmp_path / "new", best=None).resume(str(folder))


def wrap(state: dict[str, Any], depth: int) -> None:
    state["deep"] = depth


def test_moments_of_another_shape_never_reach_a_fused_kernel(tmp_path: Path) -> None:
    """Fails if a forged optimizer state makes the update read out of bounds."""
    folder = whole_checkpoint(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    moments = state["optimizer"]["state"]["$dict"]
    moments[0][1]["exp_avg"], moments[1][1]["exp_avg"] = (
        moments[1][1]["exp_avg"],
        moments[0][1]["exp_avg"],
    )
    (folder / "state.json").write_text(json.dumps(state))
    resign(folder)
    with pytest.raises(CheckpointError, match="exp_avg of parameter 0"):
        engine_in(tmp_path / "new", best=None).resume(str(folder))


def mutate(folder: Path, source: random.Random) -> str:
    """One random change of one file: bits, bytes, length, a JSON value, another file's content.

    Returns its name; the manifest may be updated to match.
    """
    name = source.choice(sorted(FILES))
    path = folder / name
    raw = bytearray(path.read_bytes())
    kind = source.randrange(7)
    if kind == 0:
        raw[source.randrange(len(raw))] ^= 1 << source.randrange(8)
    elif kind == 1:
        for _ in range(source.randrange(1, 40)):
            raw[source.randrange(min(len(raw), 400))] = source.randrange(256)
    elif kind == 2:
        del raw[source.randrange(len(raw)) :]
    elif kind == 3:
        raw += bytes(source.randrange(1, 100))
    elif kind == 4:
        place = source.randrange(len(raw))
        raw[place:place] = bytes(source.choice(b'[]{}",:0123456789-e.nulltrue\0\xff') for _ in "ab")
    elif kind == 5:
        other = source.choice(sorted(FILES))
        raw = bytearray((folder / other).read_bytes())
    else:
        digits = [i for i, byte in enumerate(raw[:3000]) if byte in b"0123456789"]
        if digits:
            raw[source.choice(digits)] = source.choice(b"0123456789-e[")
    path.write_bytes(raw)
    if source.random() < 0.8 and name != "manifest.json":
        resign(folder)
    return name


def check_mutations(tmp_path: Path, count: int, seed: int) -> int:
    """Try some changed checkpoints; returns how many were rejected."""
    original = whole_checkpoint(tmp_path / "run")
    engine = engine_in(tmp_path / "new", NotesPlugin(), resume_policy="force")
    folder = tmp_path / "mutated"
    source = random.Random(seed)
    refused = 0
    shutil.copytree(original, folder)
    for _ in range(count):
        changed = mutate(folder, source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine.resume(str(folder))
        except CheckpointError:
            refused += 1
        for name in (changed, "manifest.json"):
            shutil.copy(original / name, folder / name)
    return refused


def test_mutated_checkpoints_are_refused_or_harmless(tmp_path: Path) -> None:
    """Fails if a change, even with a matching manifest, ends in anything but a CheckpointError."""
    assert check_mutations(tmp_path, 80, seed=1) > 40


@pytest.mark.slow
def test_many_mutated_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for rarer changes, with bounded memory.

    `python -m benchmarks.mutations` makes ten thousand or more.
    """
    import resource

    monkeypatch.setattr(lock, "installed", cache(lock.installed))  # the slowest part, unchanged
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check_mutations(tmp_path, 2_000, seed=2) > 1_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def whole_checkpoint(out: Path) -> Path:
    train(engine_in(out, every=100, best=None), 3)
    return (out / "checkpoints" / "final").resolve()


class FailingDisk:
    """Replaces the sync of files; fails as often as configured."""

    def __init__(self, failures: int, error: OSError) -> None:
        self.failures, self.error, self.real = failures, error, os.fsync

    def __call__(self, descriptor: int) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error
        self.real(descriptor)


@pytest.mark.parametrize("code", [28, 5, 30])  # no space, input/output error, read-only
def test_a_save_that_fails_is_said_and_tried_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one failed save ends a long run, or leaves a partial checkpoint."""
    disk = FailingDisk(1, OSError(code, os.strerror(code)))
    monkeypatch.setattr(os, "fsync", disk)
    with pytest.warns(RuntimeWarning, match=f"step 3 could not be written.*{os.strerror(code)}"):
        train(engine_in(tmp_path, best=None), 8)
    assert checkpoints(tmp_path) == ["final", "step-00000006", "step-00000008"]


def test_a_disk_that_stays_broken_ends_the_run_with_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run continues for long without checkpoints, or damages the last valid one."""
    train(engine_in(tmp_path, best=None), 3)
    monkeypatch.setattr(os, "fsync", FailingDisk(10**9, OSError(28, "No space left on device")))
    engine = engine_in(tmp_path, best=None)
    engine.resume()
    with (
        pytest.warns(RuntimeWarning, match="could not be written"),
        pytest.raises(RunError, match="No space left on device") as caught,
    ):
        train(engine, 100)
    assert caught.value.on_command_line().endswith("--resume auto")
    monkeypatch.undo()
    assert checkpoints(tmp_path) == ["final", "step-00000003"]
    again = engine_in(tmp_path, best=None)
    again.resume()
    assert again.state.step == 3


def test_a_failure_of_the_last_save_is_never_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run looks finished although its end was not saved."""
    monkeypatch.setattr(os, "fsync", FailingDisk(10**9, OSError(5, "Input/output error")))
    with pytest.raises(RunError, match="Input/output error"):
        train(engine_in(tmp_path, every=100, best=None), 4)


class ScoresPlugin(Plugin[PluginConfig]):
    """Sets the values of evaluations; each one releases the writer that was blocked before."""

    before: ClassVar[tuple[str, ...]] = ("checkpoint",)

    def __init__(self, values: list[float], release: Callable[[], None]) -> None:
        super().__init__()
        self.values, self.release = iter(values), release

    @hookimpl
    def on_eval(self, metrics: dict[str, float]) -> None:
        self.release()
        metrics["val/score"] = next(self.values)


@pytest.mark.parametrize(
    ("values", "failures", "best", "record"),
    [
        ([3.0, 2.0, 2.5], 1, "step-00000002", {"value": 2.0, "step": 2}),
        ([3.0, 2.0, 2.5], 2, None, {}),
        ([2.0, 3.0, 1.0], 1, "step-00000003", {"value": 1.0, "step": 3}),
    ],
)
def test_a_best_that_could_not_be_written_takes_no_other_with_it(
    values: list[float],
    failures: int,
    best: str | None,
    record: StateDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a late failure undoes a newer best, or leaves one that does not exist."""
    writes = [threading.Event() for _ in range(failures)]
    held = iter(writes)
    waiting = iter([threading.Event(), *writes])  # the first evaluation comes before any write

    def fail_late(descriptor: int) -> None:
        if (write := next(held, None)) is not None:
            assert write.wait(60)
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail_late)
    scores = ScoresPlugin(values, lambda: next(waiting, threading.Event()).set())
    engine = engine_in(tmp_path, scores, every=100, best="val/score")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        train(engine, 3, eval_every="1 steps")
    link = tmp_path / "checkpoints" / "best"
    assert (str(link.readlink()) if link.is_symlink() else None) == best
    assert engine.plugins["checkpoint"].state_dict() == record


@pytest.mark.slow
def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """Fails if a file size limit leaves a checkpoint that looks complete."""
    script = f"""
import resource, signal, sys, warnings
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1] / "core")!r})
from tiny import Regression, tiny_engine
from nexus_core import ResumableLoader, RunError
from nexus_plugins.checkpoint import CheckpointPlugin
def engine():
    plugin = CheckpointPlugin(every=2, best=None, failures_allowed=0)
    return tiny_engine(plugin, out={str(tmp_path)!r})
def train(engine, until):
    return engine.fit(ResumableLoader(Regression(), 4), until=until)
train(engine(), 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
full = engine(); full.resume()
try:
    train(full, 50)
except RunError as error:
    print("error:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
last = engine(); last.resume()
print("resumed at", last.state.step)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert "resumed at 2" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert checkpoints(tmp_path) == ["final", "step-00000002"]


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    """Fails if partial checkpoints accumulate, or a half-replaced one is lost."""
    train(engine_in(tmp_path, best=None), 6)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step-00000006", root / ".tmp-step-00000009-123")
    shutil.copytree(root / "step-00000003", root / ".trash-step-00000001-123")
    (root / ".name-best").symlink_to("step-00000006")
    (root / "step-00000006").rename(root / ".replaced-step-00000006")
    engine = engine_in(tmp_path, best=None)
    engine.resume()
    assert engine.state.step == 6
    train(engine, 7)
    assert checkpoints(tmp_path) == [
        "final", "step-00000003", "step-00000006", "step-00000007",
    ]  # fmt: skip


def test_everything_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a power failure can leave a checkpoint under its name without its content."""
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        events.append(f"{path.name} -> {target.name}")
        return real(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    train(engine_in(tmp_path, every=100, best=None, final=True), 3)
    beside = f".tmp-step-00000003-{os.getpid()}"
    assert set(events[:5]) == FILES - {"manifest.json"}
    assert events[5:9] == ["manifest.json", beside, f"{beside} -> step-00000003", "checkpoints"]


CRASHES = """
import os, sys, shutil, io
from pathlib import Path
os.fsync = lambda descriptor: None  # a kill loses nothing that was written
import torch
from nexus_core import CheckpointError
from nexus_plugins._shared.checkpoints import folder, store
root = Path(sys.argv[1])
def content(step):
    named = {"a": torch.full((50,), float(step))}
    return folder.Content(step, {name: named for name in folder.TENSOR_FILES},
                          {name: {"step": step} for name in folder.JSON_FILES})
base = store.Store(root / "base")
for step in (1, 2):
    base.save(content(step), ("best",), 2)
crashes = 0
for at in range(1, 200, int(sys.argv[2])):
    shutil.rmtree(root / "run", ignore_errors=True)
    shutil.copytree(base.root, root / "run", symlinks=True)
    child = os.fork()
    if child == 0:
        left = at
        def counted(real):
            def call(*args, **options):
                global left
                left -= 1
                if left == 0:
                    os._exit(9)
                return real(*args, **options)
            return call
        for name in ("fsync", "rename", "replace", "mkdir", "symlink", "unlink", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        folder.FileIO = type("Cut", (io.FileIO,), {"write": counted(io.FileIO.write)})
        for step in (3, 3):  # the second one replaces the first
            store.Store(root / "run").save(content(step), ("best", "final"), 2)
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    crashes += died
    again = store.Store(root / "run")
    newest = folder.read(again.folders()[-1])  # whole, whatever it is
    assert newest.step in (2, 3), newest.step
    if again.named("best").name == "step-00000003":
        assert newest.step == 3
    again.recover()
    assert folder.read(again.folders()[-1]).step == newest.step
    assert not [p for p in again.root.iterdir() if p.name.startswith(".")]
    again.save(content(4), ("final",), 2)
    assert folder.read(again.named("final")).step == 4
    if not died:
        break
print("crashes", crashes)
"""


@pytest.mark.parametrize("stride", [20, pytest.param(2, marks=pytest.mark.slow)])
def test_a_crash_at_any_file_operation_leaves_a_whole_checkpoint(
    stride: int, tmp_path: Path
) -> None:
    """Fails if a kill at any moment of saving, naming or deleting loses work."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CRASHES, str(tmp_path), str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 50 / stride


def test_a_second_run_is_kept_out_and_told_by_whom(tmp_path: Path) -> None:
    """Fails if two runs write to one folder."""
    first = engine_in(tmp_path)
    running = first.steps(ResumableLoader(Regression(), 4), until=9)
    next(running)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on .* since 20"):
        train(engine_in(tmp_path), 3)
    running.close()
    again = engine_in(tmp_path)
    again.resume()
    train(again, 5)


def test_the_lock_of_a_killed_run_keeps_nobody_out(tmp_path: Path) -> None:
    """Fails if a crash leaves a folder locked, even while an orphaned worker is alive."""
    script = f"""
import os, runpy, signal, time
from pathlib import Path
RunLock = runpy.run_path({run_lock.__file__!r})["RunLock"]  # without importing PyTorch
held = RunLock(Path({str(tmp_path)!r}))
worker = os.fork()
if worker == 0:
    os.close(1)
    time.sleep(30)
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert done.stdout is not None
    worker = int(done.stdout.readline())
    done.wait()
    try:
        train(engine_in(tmp_path), 3)
    finally:
        os.kill(worker, 9)
        done.stdout.close()


class SizedConfig(PluginConfig):
    size: int = Field(8, json_schema_extra={"resume": "locked"})
    label: str = Field("a", json_schema_extra={"resume": "ignored"})
    rate: float = 0.1


class SizedPlugin(Plugin[SizedConfig]):
    """Has a setting of each policy."""


@pytest.mark.parametrize(
    ("change", "policy", "outcome"),
    [
        ({}, "exact", None),
        ({"label": "b"}, "exact", None),
        ({"rate": 0.2}, "exact", "sized.rate is 0.2, was 0.1"),
        ({"size": 9}, "exact", CheckpointError),
        ({"size": 9}, "compatible", CheckpointError),
        ({"size": 9}, "force", "sized.size is 9, was 8"),
    ],
)
def test_differences_in_settings_follow_their_policy(
    change: dict[str, Any], policy: str, outcome: Any, tmp_path: Path
) -> None:
    """Fails if a changed setting is applied silently, or one that must not change is accepted."""
    train(engine_in(tmp_path, SizedPlugin()), 3)
    engine = engine_in(tmp_path, SizedPlugin(**change), resume_policy=policy)
    if outcome is None:
        engine.resume()
    elif isinstance(outcome, str):
        with pytest.warns(RuntimeWarning, match=outcome):
            engine.resume()
    else:
        with pytest.raises(outcome, match=r"sized\.size is 9, was 8"):
            engine.resume()


def test_the_seed_of_a_run_cannot_change(tmp_path: Path) -> None:
    """Fails if a resumed run shuffles in a different order."""
    train(engine_in(tmp_path), 3)
    engine = engine_in(tmp_path)
    engine.seed = 6
    with pytest.raises(CheckpointError, match="seed is 6, was 5"):
        engine.resume()


@pytest.mark.filterwarnings("ignore:the run was 4 batches into an epoch of different data")
@pytest.mark.parametrize("until", [4, 6], ids=["within an epoch", "between two"])
def test_other_data_needs_a_policy(until: int, tmp_path: Path) -> None:
    """Fails if an exact run continues with different data."""
    engine_in(tmp_path).fit(ResumableLoader(Regression(), 4, seed=1), until=until)
    other = ResumableLoader(Regression(), 4, seed=2)
    engine = engine_in(tmp_path)
    engine.resume()
    with pytest.raises(CheckpointError, match="run used different data") as refused:
        engine.fit(other, until=9)
    assert "CheckpointPlugin(resume_policy='compatible')" in str(refused.value)
    engine = engine_in(tmp_path, resume_policy="compatible")
    engine.resume()
    with pytest.warns(RuntimeWarning, match="resuming: the training data is not that of the"):
        engine.fit(other, until=9)
    assert engine.state.step == 9


def test_data_that_is_often_the_same_is_not_taken_for_other_data() -> None:
    """Fails if randomly flipped samples have another fingerprint in each process."""

    class Flipped(Regression):
        def fingerprint(self) -> str:  # the data set's own method, which does not count
            raise NotImplementedError

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(index)
            return {**sample, "x": sample["x"] * (1 if torch.rand(()) < 0.5 else -1)}

    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found.add(ResumableLoader(Flipped(), 4).fingerprint)
    assert len(found) == 1


def test_data_that_is_never_the_same_twice_is_resumed_exactly(tmp_path: Path) -> None:
    """Fails if augmented samples count as other data, and the position is lost."""

    class Augmented(Regression):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(index)
            return {**sample, "x": sample["x"] + torch.randn(5)}

    def data() -> ResumableLoader:
        return ResumableLoader(Augmented(), 4, seed=1)

    whole = engine_in(tmp_path / "whole")
    whole.fit(data(), until=9)
    engine_in(tmp_path / "halves").fit(data(), until=4)
    engine = engine_in(tmp_path / "halves")
    engine.resume()
    engine.fit(data(), until=9)
    for one, two in zip(whole.model.parameters(), engine.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_another_set_of_plugins_needs_a_policy(tmp_path: Path) -> None:
    """Fails if a plugin is added or removed unnoticed, or its state is lost without "force"."""
    train(engine_in(tmp_path, NotesPlugin()), 3)
    with pytest.raises(CheckpointError, match="plugin 'notes' is not in this run"):
        engine_in(tmp_path).resume()
    with pytest.raises(CheckpointError, match=r"NotesPlugin\(\)"):
        engine_in(tmp_path, resume_policy="compatible").resume()
    with pytest.warns(RuntimeWarning) as said:
        engine_in(tmp_path, resume_policy="force").resume()
    assert [str(warning.message).split("'")[2] for warning in said] == [
        " is not in this run", " is dropped",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="plugin 'sized' is new"):
        engine_in(tmp_path, NotesPlugin(), SizedPlugin()).resume()
    with pytest.warns(RuntimeWarning, match="plugin 'sized' is new"):
        engine_in(tmp_path, NotesPlugin(), SizedPlugin(), resume_policy="compatible").resume()


class NewerPlugin(NotesPlugin):
    name = "notes"
    state_version = 2

    def migrate(self, state: StateDict, from_version: int) -> StateDict:
        return {"seen": {"ids": [from_version], 7: torch.zeros(3)}}


def test_an_older_state_is_migrated_when_versions_may_differ(tmp_path: Path) -> None:
    """Fails if a plugin reads an old state layout as the current one."""
    train(engine_in(tmp_path, NotesPlugin()), 3)
    with pytest.raises(CheckpointError, match="state version of plugin 'notes' is 2, was 1"):
        engine_in(tmp_path, NewerPlugin()).resume()
    engine = engine_in(tmp_path, NewerPlugin(), resume_policy="compatible")
    with pytest.warns(RuntimeWarning, match="state version"):
        engine.resume()
    assert engine.plugins["notes"].state_dict()["seen"]["ids"] == [1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(torch.relu(self.first(x)))))


def test_tied_weights_and_buffers_survive(tmp_path: Path) -> None:
    """Fails if a tied head is saved twice or not at all, or running statistics are lost."""

    def made() -> Engine:
        engine = engine_in(tmp_path)
        engine.model = Tied()
        engine.optimizer = torch.optim.AdamW(engine.model.parameters())
        engine.optimizer.param_groups[0]["initial_lr"] = 1e-3
        return engine

    engine = train(made(), 5, eval_every=None)
    file = tmp_path / "checkpoints" / "final" / "model.safetensors"
    assert "second.weight" not in load_file(file)
    theirs, ours = Tied(), made()
    load_model(theirs, file)
    ours.resume()
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
        assert torch.equal(ours.model.state_dict()[name], tensor), name


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Fails if a checkpoint is loaded into a model that it does not fit."""
    train(engine_in(tmp_path), 3)
    engine = engine_in(tmp_path)
    engine.model = nn.Linear(5, 4)
    with pytest.raises(CheckpointError, match="does not fit"):
        engine.resume()


def test_saving_beside_the_loop_stores_the_moment_of_the_save(tmp_path: Path) -> None:
    """Fails if the thread writes weights that the loop has changed in the meantime."""
    seen: dict[int, list[Tensor]] = {}
    engine = engine_in(tmp_path, every=1, keep_last=100, best=None)
    for state in engine.steps(ResumableLoader(Regression(), 4), until=12):
        seen[state.step] = [p.detach().clone() for p in engine.model.parameters()]
    model = Net()
    for step, expected in seen.items():
        file = tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        model.load_state_dict(load_file(file))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An uninterrupted run."""
    return train(engine_in(tmp_path_factory.mktemp("whole"), NotesPlugin(), every=2), 20)


@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 19), max_size=4))
def test_any_row_of_interruptions_changes_nothing(
    whole: Engine, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Fails if a run depends on how often and where it was interrupted."""
    out = tmp_path_factory.mktemp("cut")
    for cut in cuts:
        engine = engine_in(out, NotesPlugin(), every=2)
        engine.resume()
        if engine.state.step < cut:
            loader = ResumableLoader(Regression(), 4, seed=1)
            held = ResumableLoader(Regression(), 8, shuffle=False)
            for state in engine.steps(loader, until=20, eval_data=held, eval_every="4 steps"):
                if state.step == cut:
                    break
    last = engine_in(out, NotesPlugin(), every=2)
    last.resume()
    train(last, 20)
    assert_same_model_optimizer_plugins(whole, last)
