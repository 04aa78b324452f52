"""Early stopping: when it stops, and when it does not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, Result, hookimpl
from nexus_plugins.early_stop import EarlyStopPlugin

DATA = [torch.ones(1, 2)]


class FatePlugin(Plugin[PluginConfig]):
    """Sets the results of evaluations."""

    before = ("early_stop",)

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = values

    @hookimpl
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        metrics["val/score"] = self.values[engine.state.step - 1]


def engine_of(values: Sequence[float], **config: Any) -> Engine:
    model = nn.Linear(2, 1)
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        loss=lambda m, b: m(b).mean(),
        plugins=[EarlyStopPlugin(metric="val/score", **config), FatePlugin(values)],
    )


def run(engine: Engine, steps: int) -> Result:
    return engine.fit(DATA, until=steps, eval_data=DATA, eval_every=1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from(["min", "max"]),
)
def test_stops_at_the_first_run_of_evaluations_without_a_record(
    values: list[int], patience: int, mode: str
) -> None:
    """Fails if it stops too early, too late, or in the wrong direction."""
    signed = [-v for v in values] if mode == "max" else values
    last_record = [max(i for i in range(n + 1) if signed[i] < min(signed[:i], default=99))
                   for n in range(len(values))]  # fmt: skip
    expected = next((n + 1 for n, r in enumerate(last_record) if n - r >= patience), len(values))
    result = run(engine_of([float(v) for v in values], patience=patience, mode=mode), len(values))
    assert result.step == expected


def test_the_reason_says_what_happened() -> None:
    """Fails if the user cannot tell why the run ended."""
    result = run(engine_of([3, 2, 2.5, 2.5, 1, 1], patience=2), 6)
    assert (result.status, result.step) == ("stopped", 4)
    expected = "early_stop: val/score has not improved on 2 of step 2 for 2 evaluations"
    assert result.reason == expected


def test_small_gains_and_nan_do_not_count() -> None:
    """Fails if noise or a nan resets the patience."""
    assert run(engine_of([1.0, 0.95, 0.9, 0.85], patience=2, min_delta=0.2), 4).step == 3
    nan = float("nan")
    result = run(engine_of([nan, nan, nan, nan], patience=3), 4)
    assert result.step == 3
    assert "has not been a number" in result.reason


def test_patience_goes_on_after_a_restart() -> None:
    """Fails if a restart resets the patience."""
    values = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 2.5]
    first, second = engine_of(values, patience=3), engine_of(values, patience=3)
    run(first, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(second, 7).step == 5


def test_a_metric_that_is_not_there_is_an_error() -> None:
    """Fails if a misspelt metric means that the run never stops."""
    engine = engine_of([1.0] * 3)
    engine.plugins["early_stop"].config = EarlyStopPlugin(metric="val/scor").config
    with pytest.raises(
        ConfigError, match="'val/scor', which this evaluation does not have; it has"
    ):
        run(engine, 2)
