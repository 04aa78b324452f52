"""Runs in cells on one, two, three and four processes: the same bits."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, hookimpl
from nexus_core.cli.verify_resume import Order
from nexus_core.cli.verify_topology import verify_topology
from nexus_core.processes import whole
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from nexus_plugins.tape import TapePlugin
from tests.distributed.launcher import write_run
from tests.distributed.processes import together
from tests.distributed.works import Block, DeepNet, DeepPlugin, Output, Seen
from tiny import RecorderPlugin, SquaredPlugin


class DroppingNet(DeepNet):
    """A `DeepNet` with rows of whole registers, and dropout between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(5, 64)
        self.blocks = nn.ModuleList([Block(64), Block(64)])
        self.marked = nn.Parameter(torch.rand(64, 64) / 64)
        self.frozen = nn.Parameter(torch.rand(3, 64), requires_grad=False)
        self.head = nn.Linear(64, 4, bias=False)
        self.twin = nn.Linear(64, 4, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Output:
        x = self.read(x)
        for block in self.blocks:
            x = nn.functional.dropout(block(x), 0.2, self.training)
        x = x @ self.marked + (x @ self.frozen.T).sum(-1, keepdim=True) * self.sharpness
        return Output(x, self.twin.weight)


class DroppingPlugin(DeepPlugin):
    """Makes such a net."""

    name = "dropping"

    @hookimpl
    def make_model(self) -> nn.Module:
        return DroppingNet()


def trained(
    make: Any, steps: int, out: Path | None = None, stop_at: int = 0, **options: Any
) -> dict[str, object]:
    """What is the same of a run in six cells, wherever it is computed."""
    recorder, parallel = RecorderPlugin(), make(timeout=30)
    parallel.join()
    plugins = [
        parallel, DroppingPlugin(Seen()), SquaredPlugin(), ClipPlugin(max_norm=0.5), EmaPlugin(),
        OptimAdamwPlugin(lr=1e-2, eps=1e-4), recorder, TapePlugin(),
    ]  # fmt: skip
    if out is not None:
        plugins.append(CheckpointPlugin(every="3 steps", best=None))
    engine = Engine(plugins=plugins, seed=5, cells=6, log_every=1, out=out, **options)
    if out is not None and (out / "checkpoints").exists():
        engine.resume("auto")
    engine.fit(until=stop_at or steps, eval_every=4)
    named = {**dict(engine.model.named_parameters()), **dict(engine.model.named_buffers())}
    moments = {
        f"{name} {key}": value
        for name, parameter in engine.model.named_parameters()
        for key, value in engine.optimizer.state.get(parameter, {}).items()
    }
    return {
        "tensors": {name: _print(value) for name, value in {**named, **moments}.items()},
        "log": [(step, sorted(line.items())) for step, line in recorder.lines],
        "tape": engine.plugins["tape"].state_dict(),
    }


def _print(value: Tensor) -> str:
    return hashlib.sha256(whole(value.detach()).contiguous().numpy().tobytes()).hexdigest()[:12]


@pytest.mark.parametrize("make", [DdpPlugin, pytest.param(FsdpPlugin, marks=pytest.mark.slow)])
def test_two_processes_have_the_bits_of_one(make: Any) -> None:
    """Red if a weight, a moment, a metric, an evaluation or a line of the tape has another bit."""
    alone = trained(DdpPlugin, 5)
    for seen in together(2, partial(trained, make, 5)):
        assert seen == alone


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("make", [DdpPlugin, FsdpPlugin])
def test_three_and_four_have_them_too(make: Any, size: int) -> None:
    """Red where processes have unequal cells, none in a ragged batch, or parts of odd sizes."""
    alone = trained(DdpPlugin, 9)
    for seen in together(size, partial(trained, make, 9)):
        assert seen == alone


@pytest.mark.slow
def test_a_run_that_is_resized_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """Red if a checkpoint holds what belongs to a process."""
    alone = trained(DdpPlugin, 12)
    out = tmp_path / "run"
    together(4, partial(trained, DdpPlugin, 12, out, 5))
    together(3, partial(trained, DdpPlugin, 12, out, 8))
    for seen in together(2, partial(trained, DdpPlugin, 12, out)):
        assert seen["tensors"] == alone["tensors"]
        assert seen["tape"] == alone["tape"]
        assert seen["log"] == [line for line in alone["log"] if line[0] > 8]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_command_shows_it_and_names_what_differs(tmp_path: Path) -> None:
    """Red if runs are not resized, or a run whose bits depend on the processes is let through."""
    write_run(tmp_path, until="10 steps", cells=8)
    corpus = f"data_text.train={tmp_path / 'corpus.txt'}"
    order = Order(str(tmp_path / "tiny.yaml"), "", (corpus,), 1)
    report = verify_topology(order, tmp_path / "same", sizes=(1, 2), resize=1, seed=3)
    assert report.differences == report.unpromised == []
    assert [size for size, _ in report.lives] in ([1, 2], [2, 1])
    odd = Order(order.config, "", (corpus, "ddp.sum=ring"), 1)
    report = verify_topology(odd, tmp_path / "odd", sizes=(1, 3))
    assert report.differences
    assert report.differences[0].startswith("on-3 beside on-1: step ")
    assert "weights" in report.differences[0]


def test_a_run_that_is_not_in_cells_is_not_tried(tmp_path: Path) -> None:
    """Red if a run is done for nothing, or on processes that nobody brings together."""
    write_run(tmp_path)
    config = str(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match="unless it is in cells; set cells"):
        verify_topology(Order(config, "", (), 1), tmp_path / "out", sizes=(1, 2))
    order = Order(config, "no:ddp", ("cells=4",), 1)
    with pytest.raises(ConfigError, match="add one of slot 'processes'"):
        verify_topology(order, tmp_path / "out", sizes=(1, 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_ring_is_chosen_by_name_and_what_cannot_be_is_refused() -> None:
    """Red if a setting does nothing, or a run promises what it cannot keep."""
    ring = together(2, partial(trained, partial(DdpPlugin, sum="ring"), 2))
    assert ring[0] == ring[1]
    with pytest.raises(ConfigError, match="sum=tree adds cells; set cells"):
        _train_on_ones(nn.Linear(5, 4), None, sum="tree")
    with pytest.raises(ConfigError, match=r"statistics of '0' \(BatchNorm1d\) follow the batches"):
        _train_on_ones(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)), 2)


def _train_on_ones(model: nn.Module, cells: int | None, **settings: Any) -> None:
    plugins = [DdpPlugin(**settings), SquaredPlugin()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, plugins=plugins, cells=cells)
    engine.fit([{"x": torch.ones(2, 5), "y": torch.ones(2, 4)}], until=1)
