"""A resumed run ends bitwise identical to an uninterrupted one, with the same log."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_core import (
    CheckpointError,
    Engine,
    Plugin,
    PluginConfig,
    PluginError,
    ResumableLoader,
    hookimpl,
)
from nexus_core.snapshot import Snapshot
from tiny import RecorderPlugin, Regression, tiny_engine, weights


class NoisePlugin(Plugin[PluginConfig]):
    """Keeps a running number that each step depends on."""

    state_version = 2

    def __init__(self) -> None:
        super().__init__()
        self.level = 1.0

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.level *= 0.9
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 * self.level

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]

    def migrate(self, state: dict[str, Any], from_version: int) -> dict[str, Any]:
        return {"level": state["old_level"]} if from_version == 1 else state


class SaverPlugin(Plugin[PluginConfig]):
    """Takes a snapshot at one step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.snapshot: Snapshot | None = None

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        if engine.state.step == self.at:
            self.snapshot = copy.deepcopy(engine.state_dict())

    @hookimpl
    def load_snapshot(self, source: str) -> Snapshot | None:
        return self.snapshot


def run(saver: SaverPlugin, accumulate: int, resumed: bool) -> tuple[Engine, list[Any]]:
    recorder = RecorderPlugin()
    engine = tiny_engine(NoisePlugin(), recorder, saver, dropout=0.4, accumulate=accumulate)
    if resumed:
        torch.rand(17)  # other generator states, as in a new process
        engine.resume()
    evaluation = ResumableLoader(Regression(9), 4, shuffle=False)
    loader = ResumableLoader(Regression(), 4, seed=1)
    engine.fit(loader, until="12 steps", eval_data=evaluation, eval_every="4 steps")
    return engine, recorder.lines


@given(st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=15)
def test_resumed_run_ends_in_the_same_bits_with_the_same_log(at: int, accumulate: int) -> None:
    """At every step: mid-epoch, in the middle of a log period, right at an evaluation."""
    saver, loader = SaverPlugin(at), SaverPlugin(0)
    whole, lines = run(saver, accumulate, resumed=False)
    loader.snapshot = saver.snapshot
    again, later = run(loader, accumulate, resumed=True)
    assert all(map(torch.equal, weights(whole), weights(again)))
    for one, other in zip(
        whole.optimizer.state.values(), again.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert later == [line for line in lines if line[0] > at]
    states = [engine.state for engine in (whole, again)]
    assert {(s.step, s.epoch, s.batch, s.samples, s.tokens) for s in states} == {
        (12, states[0].epoch, states[0].batch, states[0].samples, states[0].tokens)
    }


def test_events_tell_of_saving_and_loading() -> None:
    class GuestPlugin(Plugin[PluginConfig]):
        seen: str | None = None

        @hookimpl
        def on_save(self, snapshot: dict[str, Any]) -> None:
            snapshot["extras"]["guest"] = {"seen": "was here"}

        @hookimpl
        def on_load(self, snapshot: dict[str, Any]) -> None:
            self.seen = snapshot["extras"]["guest"]["seen"]

    guest = GuestPlugin()
    engine = tiny_engine(guest)
    engine.load_state_dict(engine.state_dict())
    assert guest.seen == "was here"


def test_a_part_of_a_snapshot_that_cannot_come_back_is_refused() -> None:
    """Fails if a plugin's saved state is silently lost, or makes checkpoints unreadable."""

    class StrayPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_save(self, snapshot: dict[str, Any]) -> None:
            snapshot["stray"] = {"git": "abc123"}

    with pytest.raises(PluginError, match=r"'stray' put 'stray' into the snapshot.*extras"):
        tiny_engine(StrayPlugin()).state_dict()


def test_state_of_an_older_version_is_migrated() -> None:
    snapshot = tiny_engine(NoisePlugin()).state_dict()
    snapshot["plugins"]["noise"] = {"version": 1, "state": {"old_level": 0.25}}
    noise = NoisePlugin()
    tiny_engine(noise).load_state_dict(snapshot)
    assert noise.level == 0.25


def test_snapshot_that_does_not_fit_is_one_clear_error_and_changes_nothing() -> None:
    noisy = tiny_engine(NoisePlugin())
    plain = tiny_engine()
    before = weights(plain)
    with pytest.raises(CheckpointError, match="plugin 'noise', which is not in this run"):
        plain.load_state_dict(noisy.state_dict())
    snapshot = copy.deepcopy(plain.state_dict())
    snapshot["model"]["stranger"] = torch.ones(1)
    with pytest.raises(CheckpointError, match="stranger"):
        plain.load_state_dict(snapshot)
    with pytest.raises(CheckpointError, match="no plugin of this run reads checkpoints"):
        plain.resume()
    assert all(map(torch.equal, before, weights(plain)))


def test_plugin_without_state_leaves_no_key() -> None:
    assert tiny_engine(NoisePlugin()).state_dict()["plugins"].keys() == {"noise"}
