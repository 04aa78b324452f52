"""Automatic accumulation: the same training in smaller parts, and a search without side effects."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import ConfigError, DataError, Engine, Plugin
from nexus_core.errors import RunError
from nexus_core.testing import host_accelerator
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.auto_accumulate import AutoAccumulatePlugin, fit
from nexus_plugins.curriculum import CurriculumPlugin
from nexus_plugins.pcgrad import PcgradPlugin
from tiny import AbsolutePlugin, RecorderPlugin, Regression, tiny_engine, weights


def batches(rows: int = 8, count: int = 3) -> list[dict[str, Tensor]]:
    data = Regression(rows * count)
    cuts = [slice(i * rows, (i + 1) * rows) for i in range(count)]
    return [{"x": data.x[cut], "y": data.y[cut]} for cut in cuts]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a system where memory cannot be measured, so that sizes are tried, as on CUDA."""
    monkeypatch.setattr(fit, "forget_peak", lambda: False)


# -- the same training


@settings(max_examples=15)
@given(rows=st.integers(1, 8), accumulate=st.integers(1, 2), others=st.sampled_from(["", "pcgrad"]))
def test_any_split_trains_to_the_same_numbers(rows: int, accumulate: int, others: str) -> None:
    """Fails if a part is weighted separately, counted twice, or missing in gradient or metrics."""

    def run(*splitting: Plugin[Any]) -> tuple[Engine, RecorderPlugin]:
        recorder = RecorderPlugin()
        more = [PcgradPlugin()] if others else []
        engine = tiny_engine(
            AbsolutePlugin(weight=0.3), *more, *splitting, recorder, log_every=2,
            accumulate=accumulate,
        )  # fmt: skip
        engine.fit(batches(), until=4, eval_data=batches(5, 1))
        return engine, recorder

    whole, expected = run()
    split, found = run(AutoAccumulatePlugin(rows=rows))
    for a, b in zip(weights(whole), weights(split), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (split.state.samples, split.state.batch) == (whole.state.samples, whole.state.batch)
    for (step, a), (other, b) in zip(expected.lines, found.lines, strict=True):
        assert step == other
        assert {n: b[n] for n in a} == pytest.approx(a, rel=1e-4, abs=1e-6)


def test_a_function_that_returns_a_mean_is_split_too() -> None:
    """Fails if an embedded loss grows with the number of parts."""

    def run(*plugins: Plugin[Any]) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(5, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = lambda m, b: m(b["x"]).square().mean()  # noqa: E731
        Engine(model, optimizer, loss=loss, plugins=plugins).fit(batches(), until=3)
        return model.weight.detach()

    torch.testing.assert_close(run(), run(AutoAccumulatePlugin(rows=2)))


def test_a_batch_is_whole_again_when_the_step_is_over() -> None:
    """Fails if a plugin that keeps a batch (to record bad steps) only has a part of it."""
    kept: list[dict[str, Tensor]] = []
    engine = tiny_engine(AutoAccumulatePlugin(rows=3))
    cut_batch = engine.hook.cut_batch
    engine.hook.cut_batch = lambda **given: (kept.append(given["batch"]), cut_batch(**given))[1]
    engine.fit(batches(), until=1)
    assert torch.equal(kept[0]["x"], batches()[0]["x"])


def test_the_largest_part_of_a_forward_is_the_micro_batch() -> None:
    """Fails if the model sees more rows at once than allowed, or uneven parts."""
    seen: list[int] = []
    engine = tiny_engine(AutoAccumulatePlugin(rows=3))
    engine.model.register_forward_pre_hook(lambda _, args, kw: seen.append(len(kw["x"])),
                                           with_kwargs=True)  # fmt: skip
    engine.fit(batches(), until=1)
    assert seen == [2, 3, 3]
    seen.clear()
    engine.evaluate(batches()[:1])
    assert seen == [8], "evaluation is not split"


# -- the search


class Greedy(nn.Module):
    """Has dropout and a running mean, and runs out of memory above some batch size."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.attempts = most, list[int]()
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.attempts.append(len(x))
        if x.numel() > self.most:
            raise torch.OutOfMemoryError("planted")
        return self.head(self.dropout(self.norm(x)))


def greedy_engine(most: int, *plugins: Plugin[Any]) -> Engine:
    torch.manual_seed(2)
    model = Greedy(most)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (m(batch["x"]) - batch["y"].nan_to_num()).square().mean()

    return Engine(model, optimizer, loss=loss, plugins=plugins, seed=4)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.filterwarnings("ignore:auto_accumulate")
@pytest.mark.parametrize(("most", "rows"), [(1000, 8), (20, 4), (19, 2), (10, 2)])
def test_trying_finds_what_fits_and_leaves_no_trace(most: int, rows: int) -> None:
    """Fails if the search draws random numbers, changes a buffer, or leaves a gradient."""
    found = AutoAccumulatePlugin()
    searched = greedy_engine(most, found)
    searched.fit(batches(), until=3)
    told = greedy_engine(most, AutoAccumulatePlugin(rows=rows))
    told.fit(batches(), until=3)
    assert found.state_dict()["rows"] == rows
    for name, value in told.model.state_dict().items():
        assert torch.equal(value, searched.model.state_dict()[name]), name


@pytest.mark.usefixtures("unmeasured")
def test_what_cannot_be_measured_is_said() -> None:
    """Fails if a CPU run that only tried the whole batch looks as if it had been measured."""
    with pytest.warns(RuntimeWarning, match="cannot measure memory on cpu.*auto_accumulate.rows"):
        greedy_engine(1000, AutoAccumulatePlugin()).fit(batches(), until=1)


@pytest.mark.filterwarnings("ignore:auto_accumulate")
@pytest.mark.parametrize("measured", [True, False])
def test_one_row_that_does_not_fit_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    """Fails if the search never ends, or ends in the device's own error."""
    if not measured:
        monkeypatch.setattr(fit, "forget_peak", lambda: False)
    engine = greedy_engine(0, AutoAccumulatePlugin())
    with pytest.raises(RunError, match="one row"):
        engine.fit(batches(), until=1)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.filterwarnings("ignore:auto_accumulate")
def test_a_resumed_run_keeps_to_what_was_found() -> None:
    """Fails if a resumed run searches again: another size would round differently."""
    whole = greedy_engine(20, AutoAccumulatePlugin())
    whole.fit(batches(), until=4)
    first = greedy_engine(20, AutoAccumulatePlugin())
    first.fit(batches(), until=2)
    snapshot = copy.deepcopy(first.state_dict())
    second = greedy_engine(1000, AutoAccumulatePlugin())
    second.load_state_dict(snapshot)
    second.fit(batches(), until=4)
    assert second.model.attempts == [4, 4, 4, 4], "no attempts beside the two steps"
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.filterwarnings("ignore:auto_accumulate")
def test_longer_rows_are_searched_for_again() -> None:
    """Fails if a curriculum that lengthens the rows runs out of memory later."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            if input_ids.numel() > 32:
                raise torch.OutOfMemoryError("planted")
            return self.table(input_ids)

    model = Tokens()
    finder = AutoAccumulatePlugin()
    grow = CurriculumPlugin(
        mode="truncate", start_length=4, end_length=16, warmup="2 steps", round_to=4
    )
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, b: m(b["input_ids"]).square().mean(),
        plugins=[finder, grow],
    )
    data = [{"input_ids": torch.arange(128).reshape(8, 16) % 7}] * 4
    found = [finder.state_dict()["rows"] for _ in engine.steps(data, until=4)]
    assert (found[0], found[-1]) == (8, 2)


class Wide(nn.Module):
    """Saves 1 MB per row for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(250_000))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x[:, :1] * self.scale).sum(1)


def wide_engine(*plugins: Plugin[Any]) -> Engine:
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return Engine(model, optimizer, loss=lambda m, b: m(b["x"]).mean(), plugins=plugins)


MEASURED = """
import torch
from nexus_plugins.auto_accumulate import AutoAccumulatePlugin, fit
from test_auto_accumulate import wide_engine
wide_engine(AutoAccumulatePlugin(rows=1)).fit([{"x": torch.ones(2, 5)}], until=1)  # imports
told = fit.forget_peak()
before = fit.peak_memory()
finder = AutoAccumulatePlugin(limit=(before + 75e6) / 2**30, margin=0)
wide_engine(finder).fit([{"x": torch.ones(64, 5)}], until=1)
print(told, finder.state_dict()["rows"], fit.peak_memory() - before)
"""


@pytest.mark.slow
def test_measured_memory_stays_within_the_limit() -> None:
    """Fails if the peak is not measured, or a batch is tried that cannot fit.

    Runs in a separate process whose C library returns freed memory immediately, as cached memory
    would be measured too.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "250000",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    told, rows, peak = done.stdout.split()
    if told == "False":
        pytest.skip("this system does not tell the peak memory of a process")
    assert int(rows) == 32
    assert 50e6 < int(peak) < 75e6


@given(
    constant=st.integers(0, 500), slope=st.integers(1, 50), room=st.integers(1, 5000),
    rows=st.integers(1, 200),
)  # fmt: skip
def test_measuring_never_asks_for_more_than_there_is(
    constant: int, slope: int, room: int, rows: int
) -> None:
    """Fails if an attempt on the host exceeds the available memory and could be killed."""
    taken: list[int] = []

    def peak(count: int) -> int:
        taken.append(constant + slope * count)
        return taken[-1]

    if constant + slope > room:
        with pytest.raises(RunError, match="one row takes"):
            fit.largest_measured(rows, peak, room)
        return
    found = fit.largest_measured(rows, peak, room)
    assert max(taken) <= room
    assert found == rows or 2 * (constant + slope * found) > room


@given(rows=st.integers(1, 300), most=st.integers(1, 300))
def test_trying_halves_until_it_fits(rows: int, most: int) -> None:
    """Fails if it stops too early, far too late, or tries zero rows."""
    asked: list[int] = []

    def attempt(count: int) -> None:
        asked.append(count)
        if count > most:
            raise torch.OutOfMemoryError("planted")

    found = fit.largest_tried(rows, attempt, lambda: None)
    assert found == asked[-1] <= most
    assert found == rows or 2 * found > most - 1
    assert min(asked) >= 1


# -- with other plugins, and errors


def test_every_part_runs_within_what_others_wrap_around_the_model() -> None:
    """Fails if the later parts of a batch are computed without autocast."""
    engine = tiny_engine(AutoAccumulatePlugin(rows=3), AmpPlugin())
    seen: list[torch.dtype] = []
    engine.model.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    engine.fit(batches(), until=2)
    assert seen == [torch.bfloat16] * 6


def test_a_batch_that_is_no_dict_is_refused() -> None:
    """Fails if it is silently trained on whole."""
    engine = greedy_engine(100, AutoAccumulatePlugin())
    with pytest.raises(DataError, match="needs batches that are dicts of tensors.*got tuple"):
        engine.fit([(torch.ones(2, 5),)], until=1)


def test_settings_that_cannot_be_are_refused() -> None:
    """Fails if zero rows or zero memory are accepted."""
    for wrong in ({"rows": 0}, {"limit": 0}, {"margin": 1.0}):
        with pytest.raises(ConfigError, match="auto_accumulate"):
            AutoAccumulatePlugin(**wrong)


def test_an_accelerator_that_is_full_gets_smaller_parts_and_the_same_numbers() -> None:
    """Fails if the search needs CUDA, leaves a limit in the allocator, or leaks memory."""
    losses = {}
    with host_accelerator() as accelerator:
        for free in (None, 1_500_000):
            torch.manual_seed(4)
            model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 1))
            plugin = AutoAccumulatePlugin(margin=0.0)
            engine = Engine(
                model,
                torch.optim.SGD(model.to(accelerator.device).parameters(), lr=0.1),
                loss=lambda model, batch: model(batch["x"]).square().mean(),
                plugins=[plugin],
            )
            accelerator.limit = None if free is None else accelerator.allocated + free
            rows = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
            losses[free] = engine.fit([{"x": rows}], until="3 steps").metrics["train/loss"]
            found = plugin.state_dict()["rows"]
            assert found == 256 if free is None else found in (32, 64, 128)
            assert torch.get_device_module("fakegpu").get_per_process_memory_fraction() == 1.0
            del model, engine
    assert losses[None] == pytest.approx(losses[1_500_000], rel=1e-5)
