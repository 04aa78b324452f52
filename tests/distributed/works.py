"""What the processes of the tests do: short runs of the tiny problem, with what they witnessed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_core import Engine, Plugin, PluginConfig, ResumableLoader, hookimpl
from nexus_core.ranks import Ranks
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.ddp import DdpPlugin
from tiny import AbsolutePlugin, Net, RecorderPlugin, Regression, SquaredPlugin


@dataclass
class Seen:
    """What one process saw of a run."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)  # of each step
    weights: list[float] = field(default_factory=list)
    status: str = ""
    reason: str = ""
    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


class WitnessPlugin(Plugin[PluginConfig]):
    """Notes the samples of each step."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    @hookimpl
    def on_batch(self, engine: Engine, batch: Any) -> None:
        while len(self.seen.ids) <= engine.state.step:
            self.seen.ids.append([])
        self.seen.ids[engine.state.step] += batch["sample_ids"].tolist()


class StopperPlugin(Plugin[PluginConfig]):
    """Asks for the end of the run after a step."""

    at, reason = 0, ""

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        if engine.state.step + 1 == self.at:
            engine.stop(self.reason)


class UnreachedNet(Net):
    """Has a layer that no loss reaches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unreached = nn.Linear(3, 3)


def train(
    steps: int | str,
    *extra: Callable[[], Plugin[Any]],
    size: int = 23,
    batch: int = 6,
    accumulate: int = 1,
    unreached: bool = False,
    dropout: float = 0.0,
    out: Path | None = None,
    resume: bool = False,
    every: int = 5,
    parallel: Plugin[Any] | None = None,
    stop_at: int | None = None,
    stop_rank: int | None = None,
    **options: Any,
) -> Seen:
    """A run on the tiny problem; under a launcher the processes share it."""
    seen, recorder = Seen(), RecorderPlugin()
    plugins = [parallel or DdpPlugin(timeout=20)]
    plugins[0].join()
    ranks = Ranks.current()
    torch.manual_seed(3)
    model = (UnreachedNet if unreached else Net)(dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    stopper = StopperPlugin()
    plugins += [
        stopper,
        SquaredPlugin(),
        AbsolutePlugin(weight=0.3),
        recorder,
        WitnessPlugin(seen),
        *(make() for make in extra),
    ]
    if out is not None:
        plugins.append(CheckpointPlugin(every=every))
    engine = Engine(
        model, optimizer, plugins=plugins, seed=5, log_every=1, accumulate=accumulate, out=out
    )
    if stop_at is not None and stop_rank in (None, ranks.rank):
        stopper.at, stopper.reason = stop_at, f"rank {ranks.rank} stops"
    data = ResumableLoader(Regression(size), batch, seed=1, ranks=ranks)
    valid = ResumableLoader(Regression(11 if size == 23 else 9), 4, shuffle=False, ranks=ranks)
    if resume:
        engine.resume()
    result = engine.fit(data, until=steps, eval_data=valid, **options)
    lines = [line for _, line in recorder.lines]
    seen.losses = [line["train/total_loss"] for line in lines if "train/total_loss" in line]
    seen.evaluations = [line for line in lines if "val/loss" in line]
    seen.weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()
    seen.status, seen.reason, seen.step = result.status, result.reason, result.step
    seen.samples, seen.tokens = engine.state.samples, engine.state.tokens
    seen.seconds = engine.state.seconds
    return seen


def train_with(make: Callable[[], Plugin[Any]], *arguments: Any, **options: Any) -> Seen:
    """`train` with a plugin that each process makes for itself."""
    return train(*arguments, parallel=make(), **options)


def train_apart(folder: Path) -> Seen:
    """Resume from a folder that each process has for itself."""
    return train(8, out=folder / os.environ["RANK"], resume=True)
