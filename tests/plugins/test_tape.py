"""The tape: it records every difference, survives interruptions unchanged, and never syncs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, ResumableLoader, hookimpl
from nexus_plugins.console import ConsolePlugin
from nexus_plugins.tape import TapePlugin
from nexus_plugins.tape.lines import PARTS, Tape, differing, read_tape
from tiny import RecorderPlugin, Regression, tiny_engine


def engine(out: Path | None, *plugins: Plugin[Any], **options: Any) -> Engine:
    tape = TapePlugin(**options)
    return tiny_engine(*plugins, tape, dropout=0.3, out=out)


def train(out: Path, *plugins: Plugin[Any], steps: int = 6, **options: Any) -> Tape:
    made = engine(out, *plugins, **options)
    made.fit(ResumableLoader(Regression(), 4, seed=1), until=steps)
    return read_tape(out)


def test_a_file_that_cannot_be_written_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"tape\.file: cannot write '.*file/tape'"):
        train(tmp_path, file="file/tape")


class MeddlingPlugin(Plugin[PluginConfig]):
    """Interferes at some moment of the fourth step."""

    def __init__(self, moment: str, deed: Callable[[Any], None]) -> None:
        super().__init__()
        self.moment, self.deed = moment, deed

    def _meddle(self, moment: str, engine: Engine, step: int) -> None:
        if moment == self.moment and step == 4:
            self.deed(engine)

    @hookimpl
    def on_batch(self, engine: Engine, batch: Any) -> Any:
        if self.moment == "rows" and engine.state.step == 3:
            return {name: values.flip(0) for name, values in batch.items()}
        self._meddle("batch", engine, engine.state.step + 1)
        return None

    @hookimpl
    def after_backward(self, engine: Engine, step: Any) -> None:
        self._meddle("gradient", engine, step.number)

    @hookimpl
    def on_step(self, engine: Engine, step: Any) -> None:
        self._meddle("step", engine, step.number)

    def state_dict(self) -> Any:
        return {"seen": 1 if self.moment == "state" else 0}


def flip(tensor: torch.Tensor) -> None:
    """Flip the last bit of one number."""
    tensor.data.view(torch.int32)[0] ^= 1


def exchange(tensor: torch.Tensor) -> None:
    tensor.data[:2] = tensor.data[:2].flip(0).clone()


DEEDS: dict[str, tuple[str, Callable[[Any], Any], str, set[str]]] = {
    "rows": ("rows", print, "batches", set()),
    "generator": ("batch", lambda e: torch.rand(1), "generators", {"torch"}),
    "gradient": ("gradient", lambda e: flip(e.model.head.bias.grad), "gradient", {"head"}),
    "rate": ("gradient", lambda e: e.optimizer.param_groups[0].update(lr=0.02), "settings", set()),
    "bit": ("step", lambda e: flip(e.model.hidden.bias), "weights", {"hidden"}),
    "order": ("step", lambda e: exchange(e.model.head.weight), "weights", {"head"}),
    "momentum": (
        "step",
        lambda e: flip(e.optimizer.state[e.model.head.bias]["exp_avg"]),
        "optimizer",
        {"head"},
    ),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_first_difference_is_in_its_step_its_part_and_its_module(
    deed: str, tmp_path: Path
) -> None:
    moment, act, part, names = DEEDS[deed]
    plain = train(tmp_path / "a", MeddlingPlugin("never", act))
    other = train(tmp_path / "b", MeddlingPlugin(moment, act))
    first = next(s for s in plain.lines if plain.lines[s]["chain"] != other.lines[s]["chain"])
    assert first == 4
    found = differing(plain.lines[4], other.lines[4])
    assert next(iter(found)) == part
    assert not names or set(found[part]) == names


class DrawingPlugin(Plugin[PluginConfig]):
    """Draws a number at the fourth step, after the batch of one of its cells."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell, self.calls = cell, 0

    @hookimpl
    def on_batch(self, engine: Engine) -> None:
        self.calls = self.calls + 1 if engine.state.step == 3 else 0
        if self.calls == self.cell:
            torch.rand(1)


def test_in_cells_each_of_them_is_in_it(tmp_path: Path) -> None:
    """Fails if only the last cell's generators are recorded, or the batch is not cut."""

    def lines(cell: int) -> Any:
        made = tiny_engine(DrawingPlugin(cell), TapePlugin(), out=tmp_path / str(cell), cells=3)
        made.fit(ResumableLoader(Regression(), 4, seed=1), until=4)
        return read_tape(tmp_path / str(cell)).lines

    plain, first, last = map(lines, (4, 1, 3))  # the first draws in none
    assert len({*plain[1]["batches"], *plain[2]["batches"]}) == 6
    for other in (first, last):
        assert [s for s in plain if differing(plain[s], other[s])] == [4]
        assert differing(plain[4], other[4]) == {"generators": ["torch"]}
    assert first[4]["generators"] != last[4]["generators"]


def test_the_state_of_a_plugin_is_in_it(tmp_path: Path) -> None:
    one = train(tmp_path / "a", MeddlingPlugin("never", print))
    other = train(tmp_path / "b", MeddlingPlugin("state", print))
    assert differing(one.lines[1], other.lines[1]) == {"plugins": ["meddling"]}


def test_a_tape_that_was_cut_at_any_step_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """Lines after the checkpoint are dropped, a torn one is skipped, and all are written again."""
    whole = train(tmp_path / "whole", steps=6)
    loader = ResumableLoader(Regression(), 4, seed=1)
    cut = engine(tmp_path / "cut")
    snapshot: Any = None
    for state in cut.steps(loader, until=6):
        if state.step == 3:
            snapshot = copy.deepcopy(cut.state_dict())
        if state.step == 5:
            break
    with (tmp_path / "cut/tape.jsonl").open("a") as file:
        file.write('{"step": 6, "torn')
    again = engine(tmp_path / "cut")
    again.load_state_dict(snapshot)
    again.fit(ResumableLoader(Regression(), 4, seed=1), until=6)
    tape = read_tape(tmp_path / "cut")
    assert tape.lines == whole.lines
    assert [session["step"] for session in tape.sessions] == [0, 3]
    assert tape.environment(2)["threads"] == tape.environment(6)["threads"] == 1
    assert tape.broken() is None


def test_an_edited_line_breaks_the_chain(tmp_path: Path) -> None:
    train(tmp_path, steps=3)
    path = tmp_path / "tape.jsonl"
    loss = json.loads(path.read_text().splitlines()[2])["losses"]["squared"]
    path.write_text(path.read_text().replace(repr(loss), repr(loss + 1)))
    assert read_tape(tmp_path).broken() == 2


def test_the_log_has_a_hash_of_all_weights_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a weight can change without it, or it is logged at other steps or inexactly."""
    found = []
    for plugins in ([], [], [MeddlingPlugin("step", lambda e: flip(e.model.head.bias))]):
        log = RecorderPlugin()
        tape, console = TapePlugin(witness="2 steps"), ConsolePlugin(every=None)
        made = tiny_engine(*plugins, log, console, tape, log_every=1)
        made.fit(ResumableLoader(Regression(), 4, seed=1), until=6)
        found.append({s: line["weights/hash"] for s, line in log.lines if "weights/hash" in line})
    assert found[0] == found[1]
    assert list(found[0]) == [2, 4, 6]
    assert [step for step in found[0] if found[0][step] != found[2][step]] == [4, 6]
    assert f"weights {int(found[0][2]):012x}" in capsys.readouterr().out


def test_levels_leave_out_and_coarsen(tmp_path: Path) -> None:
    fine = train(tmp_path / "a")
    coarse = train(tmp_path / "b", every=3, modules=0)
    assert set(fine.lines[1]) >= {*PARTS} - {"plugins", "inputs"}
    assert [step for step, line in coarse.lines.items() if "weights" in line] == [3, 6]
    assert [*coarse.lines[3]["weights"]] == ["model"]
    assert all(not differing(fine.lines[s], coarse.lines[s]) for s in fine.lines)
