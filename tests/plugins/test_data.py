"""Data by import path: accepted return values, batching of samples, and resuming."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import called
from nexus_core import ConfigError, DataError, Engine, Plugin, PluginConfig, RunData, hookimpl
from nexus_core.processes import Ranks
from nexus_core.testing import tiny_engine
from nexus_plugins.data import DataPlugin
from nexus_plugins.data.streams import Stream

NUMBERS = TensorDataset(torch.arange(10))
BATCHES = [torch.arange(4), torch.arange(4, 10)]
LOADER = DataLoader(NUMBERS, batch_size=5)


class Streamed(IterableDataset[int]):
    """A stream of ten numbers with its own position."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < 10:
            self.place += 1
            yield self.place
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def data_of(made: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> RunData:
    """The data of a run whose data function returns `made`."""
    monkeypatch.setattr(called, "text", lambda: made)
    engine = tiny_engine(DataPlugin(call="called:text", **settings))
    assert engine.data is not None
    return engine.data


def numbers(batches: Any) -> list[list[int]]:
    return [torch.as_tensor(b[0] if isinstance(b, list) else b).tolist() for b in batches]


@pytest.mark.parametrize(
    ("made", "settings", "sets"),
    [
        (BATCHES, {}, []),
        ((BATCHES, BATCHES), {}, ["val"]),
        ((BATCHES, None), {}, []),
        ([LOADER, LOADER], {}, ["val"]),
        ({"train": BATCHES}, {}, []),
        ({"train": LOADER, "validation": BATCHES}, {}, ["val"]),
        ({"train": BATCHES, "valid": {"easy": BATCHES, "hard": BATCHES}}, {}, ["easy", "hard"]),
        (RunData(BATCHES, {"other": BATCHES}), {}, ["other"]),
        (NUMBERS, {"batch_size": 5}, []),
        ((NUMBERS, NUMBERS), {"batch_size": 5, "eval_batch_size": 2}, ["val"]),
        ([NUMBERS, NUMBERS], {"batch_size": 5}, ["val"]),
        ((Streamed(), list(range(10))), {"batch_size": 4}, ["val"]),
    ],
)
def test_training_and_evaluation_data_are_found(
    made: Any, settings: dict[str, Any], sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = data_of(made, monkeypatch, **settings)
    assert list(found.valid) == sets
    for batches in (found.train, *found.valid.values()):
        for _ in range(2):  # each can be read again
            rows = [number for batch in numbers(batches) for number in batch]
            assert len(rows) == 10
            assert len(set(rows)) == 10


def test_samples_are_shuffled_by_seed_and_evaluated_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = data_of((NUMBERS, NUMBERS), monkeypatch, batch_size=4)
    train = [number for batch in numbers(found.train) for number in batch]
    assert sorted(train) == list(range(10)) != train
    assert numbers(found.valid["val"]) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    plain = data_of(NUMBERS, monkeypatch, batch_size=4, shuffle=False, drop_last=True)
    assert numbers(plain.train) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_collate_function_makes_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    collate = {"call": "called:summed", "args": {"offset": 100}}
    found = data_of(list(range(6)), monkeypatch, batch_size=3, shuffle=False, collate=collate)
    assert [int(batch) for batch in found.train] == [103, 112]


def test_a_generator_function_is_called_anew_for_each_epoch() -> None:
    engine = tiny_engine(DataPlugin(call="called:batches", args={"sizes": [3, 2]}))
    assert engine.data is not None
    for _ in range(2):
        assert [len(x) for x, _ in engine.data.train] == [3, 2]


def test_every_process_takes_its_slice_of_a_stream() -> None:
    streams = [Stream(range(1, 10), 4, list, Ranks(rank, 2)) for rank in range(2)]
    assert [list(stream) for stream in streams] == [[[1, 3], [5, 7]], [[2, 4], [6, 8]]]


@pytest.mark.parametrize(
    ("made", "settings", "said"),
    [
        (None, {}, r"called:text returned no training data; return the training data, a pair"),
        (3, {}, r"the 'train' data of called:text is a int, which cannot be iterated"),
        ((BATCHES,), {}, "a tuple of 1"),
        ({"train": BATCHES, "test": BATCHES}, {}, "a dict with 'test'.*Known: train, codec, valid"),
        ({"train": BATCHES, "vaild": BATCHES}, {}, "'vaild'.*mean 'valid'"),
        (NUMBERS, {}, r"a data set of samples; .*batch_size=32"),
        (LOADER, {"batch_size": 4}, "is a DataLoader, which already yields batches"),
        ((BATCHES, iter(BATCHES)), {}, "'val' data of called:text.*can be read only once"),
        (Streamed(), {"batch_size": 4, "shuffle": True}, r"stream .*data\.shuffle has no effect"),
        (Streamed(), {"batch_size": 4, "num_workers": 2}, r"data\.num_workers has no effect"),
        (NUMBERS, {"batch_size": 20, "drop_last": True}, "too few for a batch of 20"),
    ],
)
def test_mistakes_are_told(
    made: Any, settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        data_of(made, monkeypatch, **settings)


def test_settings_of_samples_need_samples() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.shuffle only has an effect with data\.batch_size"
    ):
        DataPlugin(call="called:text", shuffle=True)
    again = DataPlugin(call="called:text").config.model_dump(mode="json")
    assert DataPlugin(**again).config.batch_size is None  # as in the run's stored config


@pytest.mark.parametrize("stopped", [1, 3, 4, 6])
def test_a_stream_with_a_place_of_its_own_is_resumed_there(
    stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if its state is not saved or not restored, which would repeat samples."""

    def batches(engine: Engine, until: int) -> list[list[int]]:
        for state in engine.steps(until="8 steps"):
            if state.step == until:
                break
        return engine.plugins["seen"].numbers  # type: ignore[no-any-return, attr-defined]

    def run() -> Engine:
        monkeypatch.setattr(called, "text", Streamed)
        model = torch.nn.Embedding(20, 1)
        plugins = [DataPlugin(call="called:text", batch_size=3), SeenPlugin()]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return Engine(plugins=[*plugins, GivenPlugin(model, optimizer)], loss=mean)

    whole = batches(run(), 8)
    first = run()
    before = batches(first, stopped)
    second = run()
    second.load_state_dict(first.state_dict())
    assert before[:stopped] + batches(second, 8) == whole


class SeenPlugin(Plugin[PluginConfig]):
    """Records the numbers of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[list[int]] = []

    @hookimpl
    def on_batch(self, batch: Any) -> None:
        self.numbers += numbers([batch])


class GivenPlugin(Plugin[PluginConfig]):
    """Provides a model and an optimizer."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer

    @hookimpl
    def make_model(self) -> torch.nn.Module:
        return self.model

    @hookimpl
    def make_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer


def mean(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    found: torch.Tensor = model(batch).mean()
    return found
