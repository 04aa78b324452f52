"""Steps in cells: sums do not depend on which process computes a cell, and in which order."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import (
    ConfigError,
    DataError,
    Engine,
    Plugin,
    PluginConfig,
    ResumableLoader,
    hookimpl,
)
from nexus_core.cells import Cells, CellSum, divided, edges, owned
from nexus_core.meter import Meter, added
from nexus_core.processes import Ranks
from tiny import RecorderPlugin, Regression, SquaredPlugin

KINDS = (torch.float32, torch.float64, torch.bfloat16)


def by_levels(values: list[Tensor | None]) -> Tensor | None:
    """The sum of neighbours, then of these sums, and so on, without a tree."""
    while len(values) > 1:
        pairs = [values[place : place + 2] for place in range(0, len(values), 2)]
        values = [_plus(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return values[0]


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


@settings(deadline=None, max_examples=50)
@given(
    of=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    size=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    missing=st.sampled_from((0.0, 0.3, 1.0)),
    sparse=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_sum_is_the_same_whoever_has_which_cells(
    of: list[int], size: int, kind: torch.dtype, missing: float, sparse: bool, seed: int
) -> None:
    """Fails if a bit depends on the processes, or the rounding error exceeds the depth's bound."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    count, cells = max(of), sum(of)
    found: list[Tensor | None] = [
        None
        if chance.random() < missing
        else torch.randn(5, generator=generator).mul(10 ** chance.uniform(-3, 3)).to(kind)
        for _ in range(cells)
    ]
    whole = CellSum(cells, ())
    for rank in chance.sample(range(size), size):
        own, mine = CellSum(cells, ()), owned(of, count, rank, size)
        for cell in chance.sample(mine, len(mine)):
            value = found[cell]
            kept = None if value is None else value.to_sparse() if sparse else value.clone()
            own.add(cell, [kept])
        for node, values in own.parts.items():
            whole.add_part(node, values)
    (total,) = whole.total()
    expected = by_levels(found)
    if total is None or expected is None:
        assert total is expected is None
        return
    total = total.to_dense() if sparse else total
    assert torch.equal(total, expected)
    there = [value.double().tolist() for value in found if value is not None]
    half_ulp = torch.finfo(kind).eps / 2
    for place, number in enumerate(total.double().tolist()):
        column = [values[place] for values in there]
        most = math.ceil(math.log2(cells)) * half_ulp * sum(map(abs, column)) * (1 + 1e-2)
        assert abs(number - math.fsum(column)) <= most


@settings(deadline=None, max_examples=20)
@given(cells=st.integers(1, 40))
def test_few_sums_are_kept_within_a_process(cells: int) -> None:
    """Fails if a process keeps the gradient of every cell it computed."""
    summed = CellSum(cells, ())
    for cell in range(cells):
        summed.add(cell, [torch.ones(1)])
        assert len(summed.parts) <= math.log2(cells) + 1
    assert summed.total() == [torch.full((1,), float(cells))]


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 40), cells=st.integers(1, 9), size=st.integers(1, 5))
def test_a_loader_deals_the_same_cells_to_any_number_of_processes(
    rows: int, cells: int, size: int
) -> None:
    """Fails if a cell has other rows elsewhere, or is missing, duplicated or misassigned."""
    batch = min(rows, 16)
    if batch < size:
        return
    dealt: list[dict[int, list[int]]] = [{} for _ in range(-(-rows // batch))]
    for rank in range(size):
        loader = ResumableLoader(Regression(rows), batch, seed=3, ranks=Ranks(rank, size))
        for number, part in enumerate(loader.in_cells(cells)):
            assert isinstance(part, Cells)
            for cell, (values, count) in enumerate(
                zip(part.batches, part.rows, strict=True), part.first
            ):
                ids = values["sample_ids"].tolist()
                assert len(ids) == count
                if count:
                    assert cell not in dealt[number]
                    dealt[number][cell] = ids
    alone = ResumableLoader(Regression(rows), batch, seed=3)
    for number, whole in enumerate(alone):
        ids = whole["sample_ids"].tolist()
        bounds = edges(len(ids), min(cells, len(ids)))
        assert dealt[number] == {c: ids[bounds[c] : bounds[c + 1]] for c in range(len(bounds) - 1)}


def test_a_batch_of_any_make_is_cut_or_refused() -> None:
    """Fails if part of a batch is copied whole into every cell."""
    part = divided({"x": torch.arange(5), "name": list("abcde"), "by": 2.0}, 2)
    assert [b["x"].tolist() for b in part.batches] == [[0, 1, 2], [3, 4]]
    assert [b["name"] for b in part.batches] == [list("abc"), list("de")]
    assert (part.rows, part.of, part.batches[0]["by"]) == ((3, 2), 2, 2.0)
    with pytest.raises(DataError, match="cannot be cut into cells"):
        divided(_Odd(), 2)


class _Odd:
    """Rows in a container that cannot be rebuilt."""

    def __init__(self) -> None:
        self.rows = torch.arange(4)

    def __len__(self) -> int:
        return 4


class ForwardPlugin(Plugin[PluginConfig]):
    """Draws random numbers when a batch is read, when it is computed, and between steps."""

    @hookimpl
    def on_batch(self, batch: dict[str, Tensor]) -> None:
        batch["x"] = batch["x"] + 0.1 * torch.rand_like(batch["x"])

    @hookimpl
    def forward(self, engine: Engine, batch: dict[str, Tensor]) -> Tensor:
        return engine.model(batch["x"])

    @hookimpl(stage="transform")
    def after_backward(self, engine: Engine) -> None:
        for parameter in engine.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.01 * torch.randn_like(parameter)


def test_the_split_into_micro_batches_changes_no_bit() -> None:
    """Fails if dropout, noise, sums, metrics or evaluations depend on `accumulate`."""
    found = []
    for accumulate in (1, 2, 4):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        recorder = RecorderPlugin()
        engine = Engine(
            model,
            optimizer,
            plugins=[SquaredPlugin(), ForwardPlugin(), recorder],
            seed=4,
            accumulate=accumulate,
            cells=8,
            log_every=1,
        )
        data = ResumableLoader(Regression(24), 8 // accumulate, seed=2)
        valid = ResumableLoader(Regression(7), 4, shuffle=False)
        engine.fit(data, until=5, eval_data=valid, eval_every=2)
        weights = [p.detach().tolist() for p in model.parameters()]
        found.append((weights, [line for _, line in recorder.lines]))
    assert found[0] == found[1] == found[2]


def test_cells_that_cannot_be_are_refused() -> None:
    """Fails if an invalid number of cells is reinterpreted."""
    for cells in (0, 3):
        with pytest.raises(ConfigError, match="cells must be a multiple of accumulate, 2"):
            Engine(nn.Linear(1, 1), None, accumulate=2, cells=cells)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_metrics_are_exact_whoever_has_added_what(values: list[float], cut: int, seed: int) -> None:
    """Fails if a mean depends on the order, or on a snapshot taken in between."""
    order = random.Random(seed).sample(values, len(values))
    meters = [Meter(), Meter()]
    for place, value in enumerate(order):
        meters[place < cut].add("m", value, 1.0)
    whole = Meter()
    whole.load_state_dict(added([meter.state_dict() for meter in meters]))
    assert whole.read(Ranks()) == {"m": math.fsum(values) / len(values)}
