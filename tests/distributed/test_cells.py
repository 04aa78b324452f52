"""Runs in cells are bitwise identical on one, two, three and four processes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, ResumableLoader, hookimpl
from nexus_core.cells import CellSum, owned
from nexus_core.cli.blame import blame
from nexus_core.cli.notes import NOTES
from nexus_core.cli.verify_resume import Order
from nexus_core.cli.verify_topology import verify_topology
from nexus_core.processes import Ranks, whole
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.ddp.course import course_of
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from nexus_plugins.tape import TapePlugin
from tests.distributed.launcher import write_run
from tests.distributed.processes import together
from tests.distributed.works import Block, DeepNet, DeepPlugin, GamePlugin, Output, Seen
from tiny import Net, RecorderPlugin, Regression, SquaredPlugin


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
    """Creates such a net."""

    name = "dropping"

    @hookimpl
    def make_model(self) -> nn.Module:
        return DroppingNet()


def trained(
    make: Any, steps: int, out: Path | None = None, stop_at: int = 0, **options: Any
) -> dict[str, object]:
    """The results of a run in eight cells that must be equal wherever it is computed."""
    recorder, parallel = RecorderPlugin(), make(timeout=30)
    parallel.join()
    plugins = [
        parallel, DroppingPlugin(Seen()), SquaredPlugin(), ClipPlugin(max_norm=0.5), EmaPlugin(),
        OptimAdamwPlugin(lr=1e-2, eps=1e-4), recorder, TapePlugin(witness="2 steps"),
    ]  # fmt: skip
    if out is not None:
        plugins.append(CheckpointPlugin(every="3 steps", best=None))
    engine = Engine(plugins=plugins, seed=5, cells=8, log_every=1, out=out, **options)
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


class OddNet(nn.Module):
    """A net with gradients that are hard to send during the backward pass.

    Layers: a sparse one, one reached by few cells, one by none, one trained from the fourth step
    on, one with a column-major weight, and one used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 4, sparse=True)
        self.seldom, self.never, self.late = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)
        self.turned = nn.Parameter(torch.rand(4, 5).t())
        self.late.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table((x[:, 0] > 0).long()) + self.late(x) + x @ self.turned
        return torch.tanh(self.seldom(y @ self.turned.T)) if x[0, 1] > 0.5 else y


class LatePlugin(Plugin[PluginConfig]):
    """Unfreezes a layer."""

    @hookimpl
    def on_batch(self, engine: Engine) -> None:
        if engine.state.step == 3:
            engine.model.late.requires_grad_(True)


def oddly(make: Any) -> dict[str, object]:
    """The results of runs whose steps differ: in reached parameters, turns and passes."""
    nets: dict[str, tuple[nn.Module, Any]] = {}
    torch.manual_seed(2)
    nets["odd"] = (net := OddNet()), torch.optim.SGD(net.parameters(), lr=0.05)
    nets["turns"] = (
        (net := Net()),
        {
            "hidden": torch.optim.SGD(net.hidden.parameters(), lr=0.1),
            "head": torch.optim.SGD(net.head.parameters(), lr=0.1),
        },
    )
    nets["passes"] = (net := Net()), torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    found: dict[str, object] = {}
    for name, (model, optimizer) in nets.items():
        parallel, recorder = make(timeout=30), RecorderPlugin()
        ranks = parallel.join()
        extra = {"odd": [LatePlugin()], "turns": [GamePlugin()], "passes": []}[name]
        plugins = [parallel, SquaredPlugin(), recorder, *extra]
        engine = Engine(
            model, optimizer, plugins=plugins, seed=5, cells=16, log_every=1, accumulate=2
        )
        engine.fit(ResumableLoader(Regression(), 6, seed=1, ranks=ranks), until=7)
        found[name] = {n: _print(p) for n, p in model.named_parameters()}, recorder.lines
    return found


def everything(steps: int, *parts: str) -> dict[str, Any]:
    """All runs, made in one start of processes, by name."""
    runs: dict[str, Any] = {
        "ddp": partial(trained, DdpPlugin, steps),
        "fsdp": partial(trained, FsdpPlugin, steps),
        "odd": partial(oddly, DdpPlugin),
        "ring": partial(trained, partial(DdpPlugin, sum="ring"), 2),
    }
    return {name: runs[name]() for name in parts}


@pytest.mark.slow
def test_two_processes_have_the_bits_of_one() -> None:
    """Fails if a weight, moment, metric, evaluation or line of the tape differs in any bit."""
    alone = everything(5, "ddp")
    assert [step for step, line in alone["ddp"]["log"] if "weights/hash" in dict(line)] == [2, 4]
    for seen in together(2, partial(everything, 5, "ddp")):
        assert seen == alone


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_more_and_divided_ones_have_them_too(size: int) -> None:
    """Covers unequal cells, ranks without a cell in a ragged batch, and shards of odd sizes."""
    alone = everything(9, "ddp", "odd")
    first, *others = together(size, partial(everything, 9, "ddp", "fsdp", "odd", "ring"))
    assert first["ddp"] == first["fsdp"] == alone["ddp"]
    assert first["odd"] == alone["odd"]
    for seen in others:
        assert seen == first


@settings(deadline=None, max_examples=60)
@given(
    of=st.lists(st.integers(1, 9), min_size=1, max_size=3), size=st.integers(1, 9), data=st.data()
)
def test_few_slots_hold_what_a_process_has_of_the_tree(
    of: list[int], size: int, data: st.DataObject
) -> None:
    """Fails if sums are not in tree order, or more slots are kept than necessary."""
    ranks, count = Ranks(data.draw(st.integers(0, size - 1)), size), max(of)
    course = course_of(of, count, ranks)
    summed, slots = CellSum(sum(of), ()), [torch.zeros(()) for _ in range(course.slots)]
    cells = owned(of, count, ranks.rank, size)
    for cell in cells:
        value = torch.randn(()) * 1000 ** torch.randn(())
        summed.add(cell, [value.clone()])
        move = course.moves[cell]
        slots[move.slot] = value if move.is_first else slots[move.slot] + value
        for left, right in move.merges:
            slots[left] = slots[left] + slots[right]
    assert {node: [slots[slot]] for node, slot in course.rows.items()} == summed.parts
    assert sorted(course.rows) == course.nodes[ranks.rank]
    assert course.slots <= math.log2(max(len(cells), 1)) + len(of) + 1


@pytest.mark.slow
def test_a_run_that_is_resized_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """Fails if a checkpoint depends on the number of processes."""
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
    """Fails if runs are not resized, or a run that depends on the processes passes."""
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
    assert report.unpromised == ["ddp"]
    assert re.match(r"step 1 diverges in .*, or .* sum.* \((losses|gradient) of", report.blame)
    assert report.blame.endswith("; made or changed by ddp, which does not promise it")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        (
            {"weights": {"a": "9", "b": "2"}},
            "the update (weights of a); made or changed by ddp, ema",
        ),
        ({"batches": ["0"], "weights": {}}, "the data (batches); made or changed by dropping"),
        (
            {"gradient": {"a": "9", "b": "9"}, "plugins": {}},
            "the backward pass, or its sum (gradient of b); made or changed by ddp, clip, ema",
        ),
        (
            {"plugins": {"ema": "9"}},
            "the state of a plugin (plugins of ema); made or changed by ema",
        ),
    ],
)
def test_the_first_difference_has_a_place_and_names(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Fails if later parts of a step hide the first, or unrelated plugins are named."""
    parts = {name: {"a": "1", "b": "2"} for name in ("weights", "gradient")}
    line: dict[str, Any] = {"step": 7, "batches": ["1"], "plugins": {"ema": "1"}, **parts}
    for run, text in (("one", line), ("other", line | change)):
        (tmp_path / run).mkdir()
        (tmp_path / run / NOTES).write_text(json.dumps(text) + "\n")
    plugins = [DdpPlugin(), DroppingPlugin(Seen()), ClipPlugin(), EmaPlugin(), TapePlugin()]
    found = blame(tmp_path / "one", tmp_path / "other", plugins)
    assert found == (said and f"step 7 diverges in {said}")


def test_a_run_that_is_not_in_cells_is_not_tried(tmp_path: Path) -> None:
    """Fails if a run is made that cannot be verified."""
    write_run(tmp_path)
    config = str(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match="unless the run is in cells; set cells"):
        verify_topology(Order(config, "", (), 1), tmp_path / "out", sizes=(1, 2))
    order = Order(config, "no:ddp", ("cells=4",), 1)
    with pytest.raises(ConfigError, match="add one that fills the slot 'processes'"):
        verify_topology(order, tmp_path / "out", sizes=(1, 2))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_the_same_everywhere_is_refused() -> None:
    """Fails if a run that cannot be bitwise equal is accepted."""
    with pytest.raises(ConfigError, match="sum=tree needs cells; set cells"):
        _train_on_ones(nn.Linear(5, 4), None, sum="tree")
    with pytest.raises(ConfigError, match=r"statistics of '0' \(BatchNorm1d\) depend on the"):
        _train_on_ones(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)), 2)


def _train_on_ones(model: nn.Module, cells: int | None, **settings: Any) -> None:
    plugins = [DdpPlugin(**settings), SquaredPlugin()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, plugins=plugins, cells=cells)
    engine.fit([{"x": torch.ones(2, 5), "y": torch.ones(2, 4)}], until=1)
