"""`nexus-run audit` and `nexus-run diff`: forgeries are detected, without false alarms."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from benchmarks.differences import PLANTED, compared, make, verdict
from nexus_core.cli.run import main as nexus_run
from nexus_core.sources import forget
from nexus_plugins.tape.again import Recorded
from nexus_plugins.tape.audit import unseen
from nexus_plugins.tape.lines import chained, encoded, read_tape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two equal runs of 16 steps, saved every 4: `a` and `same`."""
    folder = tmp_path_factory.mktemp("runs")
    make(folder, "a")
    make(folder, "same")
    return folder


def run(*arguments: str) -> Result:
    forget()
    return CliRunner().invoke(nexus_run, arguments)


def audited(out: Path, segments: int = 9) -> Result:
    return run("audit", str(out), "--segments", str(segments), "--trust")


def test_an_honest_run_is_not_accused_and_the_chance_is_said(folder: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (folder / "a").rglob("*"))
    done = audited(folder / "a")
    assert done.exit_code == 0, done.output
    assert "all 4 intervals of the run were re-executed" in done.output
    some = run("audit", str(folder / "same"), "--segments", "2", "--seed", "1", "--trust")
    assert some.exit_code == 0, some.output
    assert "   10%  0.81" in some.output
    assert unseen(0.1, 2) == pytest.approx(0.9**2)
    after = sorted((path, path.stat().st_mtime_ns) for path in (folder / "a").rglob("*"))
    assert after == before, "nothing of the run is changed"


def forge(checkpoint: Path, bit: int = 0) -> None:
    """Flip a bit of a weight, and update the manifest."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["head.weight"].view(-1).view(torch.int32)[5] ^= 1 << bit
    save_file(tensors, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = path.read_bytes()
    entry = manifest["files"]["model.safetensors"]
    assert set(entry) == {"size", "sha256"}
    entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def edit(path: Path, where: str, added: str) -> None:
    text = path.read_text()
    assert where in text
    path.write_text(text.replace(where, where + added, 1))


def better(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    record["train/world_loss"] *= 0.99
    (out / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(record), *lines[2:], ""]))


def dropped(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([lines[0], *lines[2:], ""]))


def retaped(out: Path) -> None:
    """Change a line of the tape, and repair the chain."""
    tape = read_tape(out)
    chain, written = "", [encoded({"session": session}) for session in tape.sessions]
    for step, line in tape.lines.items():
        if step == 7:
            line["losses"]["world"] += 1e-9
        chain = line["chain"] = chained(chain, line)
        written.append(encoded(line))
    (out / "tape.jsonl").write_text("".join(written))


FORGED: tuple[dict[str, Callable[[Path], None]], ...] = (
    {
        "step-00000008: the weights of head differ from the tape": (
            lambda out: forge(out / "checkpoints/step-00000008")
        ),
        "step-00000016: model (head.weight) differs when": (
            lambda out: forge(out / "checkpoints/step-00000016", 30)
        ),
        "metrics.jsonl, step 8: train/world_loss says": better,
        "the tape was changed: its chain breaks at step 6": (
            lambda out: edit(out / "tape.jsonl", '"step": 6, "batches": ["', "0")
        ),
    },
    {
        "metrics.jsonl: the line of step 8 is missing": dropped,
        "step 7: the tape has different digests of: losses world": retaped,
    },
)


@pytest.mark.parametrize("forged", FORGED, ids=["some", "others"])
def test_each_forgery_is_caught_and_named(
    forged: dict[str, Callable[[Path], None]], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    shutil.copytree(folder / "a", out, symlinks=True)
    for act in forged.values():
        act(out)
    done = audited(out)
    assert done.exit_code == 1, done.output
    assert [said for said in forged if said not in done.output] == [], done.output


def test_code_of_the_user_is_run_where_he_says_so_alone(folder: Path) -> None:
    for command in (["audit", str(folder / "a")], ["audit", str(folder / "absent")]):
        done = run(*command)
        assert done.exit_code == 2
        assert "add --trust" in done.output or "no such folder" in done.output
        assert "Traceback" not in done.output


def test_two_equal_runs_do_not_differ_and_absent_ones_are_an_error(folder: Path) -> None:
    same = run("diff", str(folder / "a"), str(folder / "same"))
    assert (same.exit_code, same.output) == (0, "no step differs, of 16\n")
    assert run("diff", str(folder / "a"), str(folder / "absent")).exit_code == 2


@pytest.mark.parametrize("command", ["diff", "audit"])
def test_a_command_that_fails_does_not_answer(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a failure has exit code 1, which means that runs differ."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Recorded, "at", fails)
    done = run(command, str(folder / "a"))
    assert (done.exit_code, "planted" in done.output) == (2, True)


@pytest.mark.slow
def test_a_run_that_does_not_come_out_again_is_told_why(folder: Path, tmp_path: Path) -> None:
    """Fails if an edit, a hardware fault, other code or nondeterminism is missed or confused."""
    struck = make(folder, "struck", PLANTED["a bit of a weight, unseen"])
    once = ("first difference: step 11", "update", "blocks.1", "the step is reproducible")
    differs(struck, tmp_path / "tape", lambda out: None, *once)

    def untaped(out: Path) -> None:
        (out / "tape.jsonl").unlink()
        (out / "metrics.jsonl").unlink()

    differs(struck, tmp_path / "none", untaped, "first difference: step 9", "steps 8 and 12")
    metric = ("step 8", "train/world_loss", "says ", "changed after it was")
    differs(folder / "a", tmp_path / "better", better, *metric)
    saved = ("step 8", "step-00000008", "model.head.weight", "float32 (4, 16)")
    forged = tmp_path / "forged"
    differs(folder / "a", forged, lambda out: forge(out / "checkpoints/step-00000008"), *saved)
    code = ("first difference: step 1\n", "losses", "code world.world.py")
    differs(folder / "a", tmp_path / "code", scaled("1.001"), *code)
    chance = "(1 + int.from_bytes(__import__('os').urandom(2)) / 1e6)"
    said = ("first difference: step 1\n", "loss", "mul", "differs each time")
    differs(folder / "a", tmp_path / "chance", scaled(chance), *said)


def differs(source: Path, room: Path, act: Callable[[Path], None], *said: str) -> None:
    """How a changed copy of a run differs from its re-execution, in words."""
    out = room / source.name
    shutil.copytree(source, out, symlinks=True)
    act(out)
    done = run("diff", str(out), "--trust")
    assert done.exit_code == 1, done.output
    assert [words for words in said if words not in done.output] == [], done.output


def scaled(factor: str) -> Callable[[Path], None]:
    """Multiply a loss in the code stored with a run."""

    def edit_code(out: Path) -> None:
        edit(out / "plugins/world.py", "self.constant).square().sum()", f" * {factor}")

    return edit_code


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a stale cache", "a bit of a weight, unseen"])
def test_a_planted_difference_is_named(name: str, folder: Path) -> None:
    """`python -m benchmarks.differences` plants the others."""
    found = compared(folder / "a", make(folder, f"b{len(name)}", PLANTED[name]))
    assert verdict(PLANTED[name], found) == (True, True), found
    assert found.repeated == ((True, True) if "unseen" not in name else (True, False))


@pytest.mark.slow
def test_where_a_step_cannot_be_done_again_the_tapes_speak(folder: Path) -> None:
    make(folder, "rate", PLANTED["a rate"])
    done = run("diff", str(folder / "a"), str(folder / "rate"))
    assert done.exit_code == 1, done.output
    assert "first difference: step 11" in done.output
    assert "not re-executed" in done.output
    assert "add --trust" in done.output


@pytest.mark.slow
def test_without_tapes_the_step_between_checkpoints_is_found(folder: Path) -> None:
    planted = PLANTED["a gradient"]
    one, other = make(folder, "c"), make(folder, "d", planted)
    for out in (one, other):
        (out / "tape.jsonl").unlink()
    found = compared(one, other)
    assert verdict(planted, found) == (True, True), found


TINY = """
until: 2 steps
plugins:
  data_text: {train: text.txt, valid_share: 0, seq_len: 16, batch_size: 2}
  model: {call: "nexus_core.testing:tiny_model", args: {vocabulary: 300}}
  loss_lm: {}
  optim_adamw: {}
  lr_cosine: {}
  checkpoint: {every: 2 steps}
  jsonl: {}
  tape: {}
"""


@pytest.mark.filterwarnings("ignore:resuming")
def test_every_part_of_a_run_is_repeated_with_the_settings_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run that was resumed or branched off with other settings is called false."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some words, again and again\n" * 40)
    Path("tiny.yaml").write_text(TINY)
    for command in (
        ["tiny.yaml", "--out", "a"],
        ["resume", "a", "--trust", "--set", "until=4 steps"],
        ["branch", "a@2", "--trust", "--set", "optim_adamw.lr=0.1", "--out", "b"],
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output
    for out, count in ((Path("a"), 2), (Path("b"), 1)):
        done = audited(out)
        assert (done.exit_code, done.output.count("same   steps")) == (0, count), done.output
    honest = run("diff", "a", "--trust")
    assert (honest.exit_code, honest.output.splitlines()[0]) == (0, "no step differs, of 4")
    shutil.rmtree("a/checkpoints/step-00000002")
    (said,) = Recorded.at(Path("a"), trust=True).unknown(0, 4)
    assert "resumed at step 2, of which no checkpoint is kept" in said
