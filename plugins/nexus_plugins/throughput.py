"""Measures speed and memory of the run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

import torch

from nexus_core import Plugin, PluginConfig, hookimpl
from nexus_core.cli.memory import peak_resident

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["ThroughputConfig", "ThroughputPlugin"]

GIB = 2**30


class ThroughputConfig(PluginConfig):
    """Throughput has no settings."""


class ThroughputPlugin(Plugin[ThroughputConfig]):
    """Logs speed and memory; does not affect training.

    `system/throughput_tokens_per_sec`: tokens of all ranks (rows, if batches hold no `input_ids`)
    per second of training since the last log, not counting logging, evaluation and saving.
    `system/gpu_memory`: peak allocated memory since the last log, in GiB, on CUDA.
    `system/cpu_memory`: peak resident memory of the process so far, in GiB, elsewhere.
    """

    config_class = ThroughputConfig
    api_version: ClassVar[str] = "1.2"
    _started: float
    """The start of the run, moved back by the seconds of earlier sessions."""
    _since: float
    _paused: float
    _tokens: int

    @hookimpl(stage="clock")
    def on_start(self, engine: Engine) -> None:
        """Start the clock when the engine starts its own."""
        self._since = time.perf_counter()
        self._started = self._since - engine.state.seconds
        self._paused = 0.0
        self._tokens = engine.state.tokens

    @hookimpl
    def collect_metrics(self, engine: Engine) -> dict[str, float]:
        """Speed since the last log (the device has just been synced), and memory."""
        now, tokens = time.perf_counter(), engine.state.tokens
        seconds = max(now - self._since - self._paused, 1e-9)
        rate = (tokens - self._tokens) / seconds
        self._since, self._paused, self._tokens = now, 0.0, tokens
        return {"system/throughput_tokens_per_sec": rate, **_memory(engine.device)}

    @hookimpl(stage="clock")
    def on_step_end(self, engine: Engine) -> None:
        """Exclude what followed the update (log, evaluation, checkpoint) from the time."""
        trained_until = max(self._started + engine.state.seconds, self._since)
        self._paused += time.perf_counter() - trained_until


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"system/gpu_memory": peak / GIB}
    return {"system/cpu_memory": peak_resident() / GIB}
