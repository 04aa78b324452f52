"""The sequence-length curriculum: no token lost, schedule followed, evaluation unaffected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import ConfigError, DataError, Engine, Plugin, PluginConfig, TrainState, hookimpl
from nexus_plugins.curriculum import CurriculumPlugin


class SeePlugin(Plugin[PluginConfig]):
    """Records the batches that the model gets."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []

    @hookimpl
    def loss_units(self, engine: Engine, batch: dict[str, Tensor]) -> dict[str, float]:
        (self.trained if engine.training else self.evaluated).append(batch)
        return {}


def batch_of(rows: int, time: int) -> dict[str, Tensor]:
    ids = torch.arange(rows * time).reshape(rows, time)
    return {
        "input_ids": ids,
        "labels": ids + 1,
        "segment_ids": ids // 5,
        "world_targets": torch.stack([ids, -ids], dim=-1),
        "sample_ids": torch.arange(rows),
        "temperature": torch.tensor(1.0),
    }


def engine_of(plugin: CurriculumPlugin, see: SeePlugin, **more: Any) -> Engine:
    model = nn.Linear(1, 1)
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        loss=lambda m, b: m.weight.sum() * 0,
        plugins=[plugin, see],
        log_every=1,
        **more,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.sampled_from([16, 24, 32, 96]), st.integers(4, 40))
def test_reshaping_keeps_every_token_with_its_label_in_order(
    rows: int, time: int, start: int
) -> None:
    """Fails if a token, a label or a target is lost, moved or paired with another."""
    see = SeePlugin()
    plugin = CurriculumPlugin(start_length=start, end_length=64, round_to=4)
    engine = engine_of(plugin, see)
    engine.fit([batch_of(rows, time)], until="1 step")
    (got,), wanted = see.trained, batch_of(rows, time)
    for name in ("input_ids", "labels", "segment_ids", "world_targets"):
        assert torch.equal(got[name].reshape(wanted[name].shape), wanted[name]), name
        assert got[name].shape[:2] == got["input_ids"].shape
    assert got["input_ids"].shape[1] <= max(start, 4)
    assert torch.equal(got["sample_ids"], got["input_ids"][:, 0] // time), "per-row entries follow"
    assert got["temperature"].ndim == 0
    assert engine.state.tokens == rows * time


def test_truncation_keeps_the_beginnings() -> None:
    """Fails if truncated rows lose their start, or labels come from elsewhere."""
    see = SeePlugin()
    plugin = CurriculumPlugin(start_length=8, end_length=16, round_to=8, mode="truncate")
    engine_of(plugin, see).fit([batch_of(3, 20)], until="1 step")
    (got,), wanted = see.trained, batch_of(3, 20)
    for name in ("input_ids", "labels", "segment_ids", "world_targets"):
        assert torch.equal(got[name], wanted[name][:, :8])
    assert torch.equal(got["sample_ids"], wanted["sample_ids"])


def test_rows_grow_with_the_run_and_evaluation_is_whole() -> None:
    """Fails if the length is constant, decreases, or affects evaluation."""
    see = SeePlugin()
    plugin = CurriculumPlugin(start_length=8, end_length=64, warmup="8 steps", round_to=8)
    result = engine_of(plugin, see).fit(
        [batch_of(2, 64)], until="10 steps", eval_data=[batch_of(2, 64)], eval_every="3 steps"
    )
    lengths = [batch["input_ids"].shape[1] for batch in see.trained]
    assert lengths == [8, 8, 16, 16, 32, 32, 32, 32, 64, 64]
    assert {batch["input_ids"].shape for batch in see.evaluated} == {(2, 64)}
    assert result.metrics["curriculum/seq_len"] == 64


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shape": "linear"}, [256, 704, 1152, 1600, 2048]),
        ({"shape": "sqrt"}, [256, 1152, 1472, 1792, 2048]),
        ({"shape": "step", "table": [[0, 128], [0.5, 512], [1, 1000]]}, [128, 128, 512, 512, 960]),
    ],
)
def test_the_plan_is_a_pure_function_of_progress(
    settings: dict[str, Any], expected: list[int]
) -> None:
    """Fails if a shape is wrong, or lengths are not rounded down to 64."""
    plugin = CurriculumPlugin(warmup="1000 tokens", **settings)
    lengths = [plugin.length(TrainState(tokens=tokens)) for tokens in range(0, 1001, 250)]
    assert lengths == expected


def test_rows_that_cannot_be_cut_evenly_are_refused() -> None:
    """Fails if rows of a prime length are silently cut into single tokens."""
    engine = engine_of(CurriculumPlugin(start_length=64), SeePlugin())
    with pytest.raises(ConfigError, match=r"rows of 257 tokens cannot.*mode=truncate"):
        engine.fit([batch_of(1, 257)], until="1 step")


def test_batches_without_tokens_are_refused() -> None:
    """Fails if a run on other data silently has no curriculum."""
    engine = engine_of(CurriculumPlugin(), SeePlugin())
    with pytest.raises(DataError, match="curriculum needs batches with 'input_ids'"):
        engine.fit([{"x": torch.ones(2, 2)}], until="1 step")


@pytest.mark.parametrize(
    "settings",
    [
        {"start_length": 100, "end_length": 50},
        {"shape": "step"},
        {"table": [[0, 128]]},
        {"shape": "step", "table": [[0.5, 128], [0, 64]]},
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict[str, Any]) -> None:
    """Fails if a contradictory schedule is accepted."""
    with pytest.raises(ConfigError, match="curriculum"):
        CurriculumPlugin(**settings)
