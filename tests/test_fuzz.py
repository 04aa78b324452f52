"""Damaged input ends in an error meant for the user, or is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import fuzz  # noqa: E402
from benchmarks.fuzzing import Target, damaged  # noqa: E402


@pytest.mark.parametrize("inputs", [12, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_input_is_read_or_refused(name: str, inputs: int) -> None:
    """No file may end a run with a traceback, exhaust memory, or hang."""
    target = fuzz.TARGETS[name]
    seeds = target.seeds()
    outcome = fuzz.Outcome()

    @given(seed=st.integers(0, 2**64))
    @settings(
        deadline=None,
        max_examples=inputs,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def feed(seed: int) -> None:
        assert fuzz.read_once(target, damaged(target, seeds, Random(seed)), outcome) is None

    feed()


def test_sound_input_is_read() -> None:
    """Fuzzing with rejected seeds would prove nothing."""
    for name, target in fuzz.TARGETS.items():
        readable = 0
        for files in target.seeds():
            outcome = fuzz.Outcome()
            packed = {file: target.pack(file, raw) for file, raw in files.items()}
            fuzz.read_once(target, packed, outcome)
            readable += outcome.read
        assert readable, name


def broken(folder: Path) -> None:
    raw = (folder / "a").read_bytes()
    if raw == b"key":
        raise KeyError("what")
    if raw == b"memory":
        kept = bytearray(200 << 20)
        kept[::4096] = b"x" * len(kept[::4096])


@pytest.mark.parametrize(
    ("raw", "fault"),
    [("fine", None), ("key", "KeyError: 'what'"), ("memory", "MiB of memory for 6")],
)
def test_faults_are_found(raw: str, fault: str | None) -> None:
    """Fuzzing that cannot find faults would always pass."""
    found = fuzz.read_once(Target(list, broken), {"a": raw.encode()}, fuzz.Outcome())
    assert (found is None) if fault is None else (found is not None and fault in found)


@pytest.mark.slow
def test_the_command_prints_a_table(tmp_path: Path) -> None:
    wish = ["--only", "txt", "--inputs", "60", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", *wish],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "txt" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["txt"]
    assert (found["inputs"], found["faults"]) == (60, [])
