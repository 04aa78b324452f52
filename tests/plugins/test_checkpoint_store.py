"""The checkpoint folder with failing file operations, and abandoned histories."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_core import CheckpointError, Engine, ResumableLoader
from nexus_plugins.checkpoint import CheckpointPlugin
from tiny import Regression, tiny_engine


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def engine_in(out: Path, **settings: Any) -> Engine:
    return tiny_engine(CheckpointPlugin(**{"every": "3 steps", "best": None, **settings}), out=out)


def train(engine: Engine, until: int, **options: Any) -> Engine:
    engine.fit(ResumableLoader(Regression(), 4, seed=1), until=until, **options)
    return engine


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def refusing(real: Callable[..., Any], word: str) -> Callable[..., Any]:
    """A file operation that fails for paths containing a word."""

    def operation(path: Any, *rest: Any, **options: Any) -> Any:
        if word in str(path):
            raise PermissionError(1, "Operation not permitted", str(path))
        return real(path, *rest, **options)

    return operation


@pytest.mark.parametrize(
    ("owner", "name", "word", "left"),
    [
        (shutil, "rmtree", ".trash-step-00000003", ".trash-step-00000003"),
        (Path, "rename", "step-00000003", "step-00000003"),
    ],
)
def test_what_cannot_be_deleted_stays_and_is_said_once(
    owner: Any,
    name: str,
    word: str,
    left: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Fails if a run ends because an old checkpoint cannot be deleted, although saves succeed."""
    train(engine_in(tmp_path, keep_last=1), 3)
    monkeypatch.setattr(owner, name, refusing(getattr(owner, name), word))
    engine = engine_in(tmp_path, keep_last=1)
    engine.resume()
    train(engine, 12)
    assert engine.state.step == 12
    assert any(found.startswith(left) for found in names(tmp_path))
    assert "step-00000012" in names(tmp_path)
    said = [str(w.message) for w in recwarn if "cannot be deleted" in str(w.message)]
    assert len(said) == 1
    assert "step-00000003" in said[0]
    again = engine_in(tmp_path)
    again.resume()
    train(again, 13)


def test_strangers_among_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """Fails if a stray file, pipe, link or copy ends a run, or is mistaken for its newest save."""
    train(engine_in(tmp_path), 6)
    root = tmp_path / "checkpoints"
    (root / ".tmp-x").write_text("x")
    (root / ".trash-y").write_text("y")
    (root / ".replaced-z").write_text("z")
    (root / "step-00000100").write_text("x")
    (root / "step-00000200").symlink_to("step-00000003")
    os.mkfifo(root / "step-00000300")
    shutil.copytree(root / "step-00000003", root / "step-00000400")
    engine = engine_in(tmp_path)
    with pytest.warns(RuntimeWarning, match="step-00000400 is of step 3"):
        engine.resume()
    assert engine.state.step == 6
    with pytest.warns(RuntimeWarning, match="a later checkpoint was moved"):
        train(engine, 9)
    assert {"step-00000009", "step-00000100", "step-00000200", "step-00000300"} <= {
        *names(tmp_path)
    }
    assert not {".tmp-x", ".trash-y", ".replaced-z", "step-00000400"} & {*names(tmp_path)}


def test_a_stray_file_of_a_steps_name_makes_room(tmp_path: Path) -> None:
    """Fails if a save fails because a file has its name."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000003").write_text("x")
    train(engine_in(tmp_path), 3)
    assert names(tmp_path) == ["final", "step-00000003"]


def test_names_work_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if 'best' and 'final' need a file system with links, or retention forgets them."""

    def none(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", none)
    held = ResumableLoader(Regression(), 8, shuffle=False)
    engine = engine_in(tmp_path, best="val/loss", mode="max", keep_last=1)
    train(engine, 9, eval_data=held, eval_every="3 steps")
    best = (tmp_path / "checkpoints" / "best").read_text().strip()
    assert best == "step-00000003"  # the loss decreases
    assert names(tmp_path) == ["best", "final", "step-00000003", "step-00000009"]
    for source in ("best", str(tmp_path / "checkpoints" / "best")):
        again = engine_in(tmp_path, best="val/loss", mode="max")
        again.resume(source)
        assert again.state.step == 3


def test_a_copy_in_which_links_became_folders_is_a_run(tmp_path: Path) -> None:
    """Fails if a copy of a run with links followed cannot save, or loses its names."""
    train(engine_in(tmp_path / "run"), 3)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    engine = engine_in(tmp_path / "copy")
    engine.resume("final")
    assert engine.state.step == 3
    with pytest.warns(RuntimeWarning, match="final cannot be made the name of step-00000006"):
        train(engine, 6)


@pytest.mark.parametrize("name", ["run.lock", "checkpoints/set-aside"])
def test_a_link_in_a_runs_folder_is_never_written_through(name: str, tmp_path: Path) -> None:
    """Fails if a run follows a planted link and writes outside its folder."""
    train(engine_in(tmp_path / "run"), 6)
    victim = tmp_path / "victim"
    victim.write_text("precious") if name == "run.lock" else victim.mkdir()
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(victim)
    engine = engine_in(tmp_path / "run")
    engine.resume(str(tmp_path / "run/checkpoints/step-00000003"))
    with pytest.raises(CheckpointError, match="link"):
        train(engine, 9)
    assert victim.read_text() == "precious" if victim.is_file() else not list(victim.iterdir())


def test_what_is_of_another_course_and_cannot_be_moved_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run goes back but later checkpoints stay, and could be resumed from."""
    train(engine_in(tmp_path), 6)
    engine = engine_in(tmp_path)
    engine.resume(str(tmp_path / "checkpoints" / "step-00000003"))
    monkeypatch.setattr(Path, "rename", refusing(Path.rename, "step-00000006"))
    with pytest.raises(CheckpointError, match="step-00000006 is from a different course"):
        train(engine, 9)


# -- abandoned histories


def first_weight(engine: Engine) -> float:
    return next(engine.model.parameters()).flatten()[0].item()


def started(engine: Engine) -> None:
    """Train a step and stop like a kill, without saving."""
    next(iter(engine.steps(ResumableLoader(Regression(), 4, seed=1), until=100)))


def other_run(out: Path, until: int) -> Path:
    engine = engine_in(out)
    torch.nn.init.constant_(next(engine.model.parameters()), 3.0)
    train(engine, until)
    return out / "checkpoints" / f"step-{until:08d}"


@pytest.mark.filterwarnings("ignore:the run continues")
@pytest.mark.parametrize("later", [True, False])
def test_a_run_killed_before_its_first_save_goes_on_from_where_it_had_begun(
    later: bool, tmp_path: Path
) -> None:
    """Fails if the newest checkpoint of an abandoned history is mistaken for this run's."""
    train(engine_in(tmp_path / "run"), 9 if later else 3)
    source = other_run(tmp_path / "other", 6)
    engine = engine_in(tmp_path / "run")
    engine.resume(str(source))
    expected = first_weight(engine)
    started(engine)
    for _ in range(2):  # also repeatedly
        again = engine_in(tmp_path / "run")
        again.resume("auto")
        assert (again.state.step, first_weight(again)) == (6, expected)
        started(again)
    train(again, 9)
    last = engine_in(tmp_path / "run")
    last.resume("auto")
    assert last.state.step == 9
    assert first_weight(last) == first_weight(again)


@pytest.mark.filterwarnings("ignore:the run continues")
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_while_a_course_begins_never_leads_back(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a kill at some moment leaves the abandoned history as the newest."""
    train(engine_in(tmp_path), 9)
    engine = engine_in(tmp_path)
    engine.resume(str(tmp_path / "checkpoints" / "step-00000003"))
    real, left = Path.rename, [moved]

    def rename(path: Path, target: Path) -> Path:
        if "set-aside" in str(target):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    if moved < 2:
        with pytest.raises(KeyboardInterrupt):
            started(engine)
    else:
        started(engine)
    monkeypatch.undo()
    again = engine_in(tmp_path)
    again.resume("auto")
    assert again.state.step == 3


@pytest.mark.filterwarnings("ignore:the run continues")
def test_a_restart_by_the_launcher_takes_what_this_launch_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a restart goes back to the named checkpoint, or a new launch does not."""
    source = str(other_run(tmp_path / "other", 6))
    engine = engine_in(tmp_path / "run")
    engine.resume(source)
    train(engine, 9)

    def step_after(restarts: str) -> int:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        again = engine_in(tmp_path / "run")
        again.resume(source)
        return again.state.step

    assert step_after("1") == 9
    assert step_after("0") == 6
    note = tmp_path / "run" / "checkpoints" / "course.json"
    facts = json.loads(note.read_text())
    note.write_text(json.dumps({**facts, "launch": [socket.gethostname(), "1", "2"]}))
    assert step_after("1") == 6  # another launch named the same one
    note.write_text(json.dumps({**facts, "launch": ["elsewhere", "1", "2"]}))
    assert step_after("1") == 9  # rank 0 may be another process


@pytest.mark.parametrize("text", ["", "[]", '{"asked": 1}', "[" * 100_000, "{}" * 100_000])
def test_a_note_that_cannot_be_read_is_said(text: str, tmp_path: Path) -> None:
    """Fails if a damaged record is ignored, and the abandoned history is resumed."""
    train(engine_in(tmp_path), 3)
    (tmp_path / "checkpoints" / "course.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"course\.json cannot be read"):
        engine_in(tmp_path).resume("auto")
