"""Warm-up, stable, decay."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nexus_core import ConfigError, Engine
from nexus_plugins.lr_wsd import LrWsdPlugin

DATA = [torch.ones(2, 2)] * 4


def engine_of(**config: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        loss=lambda m, b: m(b).mean() * 1e-3,
        plugins=[LrWsdPlugin(**config)],
    )


def rates(engine: Engine, until: str) -> list[float]:
    return [engine.optimizer.param_groups[0]["lr"] for _ in engine.steps(DATA, until=until)]


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_rises_stays_and_falls_at_the_end(shape: str) -> None:
    """Fails if a corner of the schedule is at another step, or the decay has another shape."""
    engine = engine_of(warmup=4, decay="6 steps", min_lr=0.1, shape=shape)
    got = rates(engine, "20 steps")
    done = np.clip((np.arange(20) - 14) / 6, 0, 1)
    fall = 0.1 + 0.9 * (1 - (done if shape == "linear" else np.sqrt(done)))
    assert got == pytest.approx(list(np.minimum(1, (np.arange(20) + 1) / 4) * fall))


def test_without_a_length_the_last_fifth_falls() -> None:
    """Fails if the default decay is not the last fifth of the run."""
    got = rates(engine_of(warmup=0, min_lr=0), "20 steps")
    assert [rate == 1.0 for rate in got] == [True] * 17 + [False] * 3


def test_a_later_horizon_on_resuming_is_as_if_it_had_been_planned() -> None:
    """Fails if the stable part depends on the horizon, so that a run cannot be extended."""
    config: dict[str, Any] = {"warmup": 3, "decay": "4 steps", "min_lr": 0}
    planned = engine_of(**config)
    planned.fit(DATA, until="20 steps")
    first, second = engine_of(**config), engine_of(**config)
    for state in first.steps(DATA, until="12 steps"):
        if state.step == 8:
            break
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(DATA, until="20 steps")
    for one, other in zip(planned.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_fall_may_be_in_epochs_of_a_run_in_steps() -> None:
    """Fails if epochs are not converted to steps if the data has a length (4 batches)."""
    by_epoch = rates(engine_of(warmup=0, decay="1 epoch", min_lr=0), "12 steps")
    assert by_epoch == rates(engine_of(warmup=0, decay="4 steps", min_lr=0), "12 steps")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"warmup": 12, "decay": "10 steps"}, "do not fit into a run of 20 steps"),
        ({"warmup": 0, "decay": "1000 tokens"}, "so give it in steps"),
    ],
)
def test_a_fall_that_cannot_be_is_refused(config: dict[str, Any], words: str) -> None:
    """Fails if the rate would never reach its base, or never decay."""
    with pytest.raises(ConfigError, match=words):
        rates(engine_of(min_lr=0, **config), "20 steps")
