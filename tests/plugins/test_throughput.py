"""Throughput and memory: what counts, and what does not."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from nexus_core import Engine, Plugin, PluginConfig, hookimpl
from nexus_plugins import throughput
from nexus_plugins.throughput import ThroughputPlugin


class Clock:
    """Stands in for `time.perf_counter`; moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SlowPlugin(Plugin[PluginConfig]):
    """Spends known amounts of time in each part of a step."""

    clock: Clock

    def spend(self, seconds: float) -> None:
        self.clock.now += seconds

    @hookimpl
    def after_backward(self) -> None:
        self.spend(0.5)

    @hookimpl
    def on_log(self) -> None:
        self.spend(7.0)

    @hookimpl
    def on_eval(self) -> None:
        self.spend(100.0)

    @hookimpl
    def on_step_end(self) -> None:
        self.spend(30.0)


class KeepPlugin(Plugin[PluginConfig]):
    """Records every log."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[dict[str, float]] = []

    @hookimpl
    def on_log(self, metrics: dict[str, float]) -> None:
        self.logs.append(dict(metrics))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    assert throughput.time.perf_counter is clock
    return clock


def engine_of(*plugins: Plugin[Any], **settings: Any) -> Engine:
    model = nn.Embedding(5, 2)
    return Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, b: m(b["input_ids"]).sum(),
        plugins=plugins,
        **settings,
    )


@pytest.mark.parametrize("slow_first", [True, False])
def test_only_training_time_counts(clock: Clock, slow_first: bool) -> None:
    """Fails if logs, evaluations or checkpoints make the run look slow: 12 tokens in 0.5 s."""
    slow, keep = SlowPlugin(), KeepPlugin()
    slow.clock = clock
    pair = [slow, ThroughputPlugin()] if slow_first else [ThroughputPlugin(), slow]
    engine = engine_of(*pair, keep, log_every=2)
    data = [{"input_ids": torch.zeros(3, 4, dtype=torch.long)}]
    engine.fit(data, until="8 steps", eval_data=data, eval_every="2 steps")
    rates = [log["system/throughput_tokens_per_sec"] for log in keep.logs]
    assert rates == pytest.approx([24.0] * 4)


def test_a_resumed_run_counts_only_its_own_time(clock: Clock) -> None:
    """Fails if the first log after resuming divides by the time of earlier sessions."""
    data = [{"input_ids": torch.zeros(3, 4, dtype=torch.long)}]
    slow, keep = SlowPlugin(), KeepPlugin()
    slow.clock = clock
    engine = engine_of(slow, ThroughputPlugin(), keep, log_every=2)
    engine.state.step, engine.state.tokens, engine.state.seconds = 10, 10_000, 5_000.0
    engine.fit(data, until="12 steps")
    assert keep.logs[0]["system/throughput_tokens_per_sec"] == pytest.approx(24.0)


def test_memory_is_this_processs_in_gib() -> None:
    """Fails if the unit is off by 1024: a process with torch is between 50 MiB and 64 GiB."""
    keep = KeepPlugin()
    engine = engine_of(ThroughputPlugin(), keep, log_every=1)
    engine.fit([{"input_ids": torch.zeros(1, 1, dtype=torch.long)}], until="1 step")
    assert 0.05 < keep.logs[0]["system/cpu_memory"] < 64
