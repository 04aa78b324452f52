"""Which rows a run trains on: other data, other sizes, unusual loaders, any type of batch."""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, DistributedSampler

from nexus_core import Engine, Plugin, PluginConfig, ResumableLoader, hookimpl
from nexus_core.batches import to_device

ROWS = 24


class Ids:
    """Row i is i."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class Counter:
    """An engine that records what it trains on; its weights are those of a handwritten loop."""

    def __init__(self, accumulate: int = 1) -> None:
        self.seen: list[Any] = []
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        self.engine = Engine(model, optimizer, loss=self.loss, accumulate=accumulate)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch
        if model.training:
            self.seen += x.flatten().int().tolist()
        return model(x).square().mean()

    def fit(self, data: Iterable[Any], until: str) -> list[int]:
        start = len(self.seen)
        self.engine.fit(data, until=until)
        return self.seen[start:]


def batches(first: int, count: int) -> list[Tensor]:
    return [torch.full((1, 1), float(first + place)) for place in range(count)]


@pytest.mark.parametrize("length", [3, 10])
def test_another_data_set_begins_at_its_first_batch_and_it_is_said(length: int) -> None:
    counter = Counter()
    assert counter.fit(batches(0, 10), "5 steps") == [0, 1, 2, 3, 4]
    other = batches(100, length)
    with pytest.warns(RuntimeWarning, match="5 batches into an epoch of different data"):
        seen = counter.fit(other, "11 steps")
    assert seen == [100 + place % length for place in range(6)]


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.integers(1, 8), st.integers(1, 8), st.booleans())
@settings(max_examples=25, deadline=None)
def test_another_batch_size_continues_at_the_right_row(
    before: int, steps: int, after: int, shuffle: bool
) -> None:
    """Fails if rows are repeated or skipped in the rest of the epoch, or it ends too early."""
    steps = min(steps, ROWS // before)
    first = Counter()
    read = first.fit(ResumableLoader(Ids(), before, seed=1, shuffle=shuffle), f"{steps} steps")
    again = Counter()
    again.engine.load_state_dict(copy.deepcopy(first.engine.state_dict()))
    rest = again.fit(ResumableLoader(Ids(), after, seed=1, shuffle=shuffle), "1 epochs")
    whole = [row for b in ResumableLoader(Ids(), 1, seed=1, shuffle=shuffle) for row in b]
    assert read + rest == [int(row) for row in whole]


def test_a_loader_is_read_again_after_a_loop_that_was_left_is_collected() -> None:
    """Fails if a reader that was garbage-collected with its loop yields nothing."""
    loader = ResumableLoader(Ids(), 4, shuffle=False)
    for _ in range(3):
        Counter().fit(loader, "4 steps")
        gc.collect()
        assert Counter().fit(loader, "1 epochs") == list(range(ROWS))


def test_a_cursor_far_beyond_the_data_is_at_its_end() -> None:
    """Fails if a cursor beyond the data makes it read forever."""
    first, again = Counter(), Counter()
    data = batches(0, 6)
    first.fit(data, "4 steps")
    snapshot = copy.deepcopy(first.engine.state_dict())
    snapshot["train"]["batch"] = 10**18
    again.engine.load_state_dict(snapshot)
    assert again.fit(data, "6 steps") == [0, 1]


def test_a_changed_length_is_said() -> None:
    class Sized:
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __iter__(self) -> Iterator[Tensor]:
            return iter(batches(0, self.count))

    first, again = Counter(), Counter()
    first.fit(Sized(6), "4 steps")
    again.engine.load_state_dict(copy.deepcopy(first.engine.state_dict()))
    with pytest.warns(RuntimeWarning, match="had 6 batches per epoch and now has 9"):
        assert again.fit(Sized(9), "6 steps") == [4, 5]


class Epilogue:
    """Counts epochs after the last batch, as loader wrappers do, and shuffles by them."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(6, generator=torch.Generator().manual_seed(self.epoch))
        yield from (torch.full((1, 1), float(place)) for place in order)
        self.epoch += 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loader_is_read_to_its_end(accumulate: int) -> None:
    hand, loader = Epilogue(), Epilogue()
    expected = [int(batch) for _ in range(3) for batch in hand]
    assert Counter(accumulate).fit(loader, "3 epochs") == expected
    assert loader.epoch == 3


def test_samplers_and_data_sets_are_told_the_epoch() -> None:
    def loader() -> DataLoader[Tensor]:
        sampler = DistributedSampler(Ids(), num_replicas=1, rank=0)
        return DataLoader(Ids(), 4, sampler=sampler)

    hand, expected = loader(), []
    for epoch in range(2):
        hand.sampler.set_epoch(epoch)
        expected += [int(row) for batch in hand for row in batch]
    assert Counter().fit(loader(), "2 epochs") == expected


class Holder:
    """A stream that saves its own position, and counts its reads."""

    def __init__(self) -> None:
        self.at = self.read = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < 10:
            self.at, self.read = self.at + 1, self.read + 1
            yield torch.full((1, 1), float(self.at - 1))
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_that_holds_its_place_is_asked_for_it_and_can_be_resumed_twice(
    accumulate: int,
) -> None:
    """Fails if it is replayed from the start, or the position of the first resume is reused."""
    whole = Counter(accumulate).fit(Holder(), "12 steps")
    counter, seen = Counter(accumulate), []
    for until in (3, 8, 12):
        data = Holder()
        if seen:
            snapshot = copy.deepcopy(counter.engine.state_dict())
            counter = Counter(accumulate)
            counter.engine.load_state_dict(snapshot)
        part = counter.fit(data, f"{until} steps")
        assert data.read <= len(part) + 1
        seen += part
    assert seen == whole


class Lying:
    """Has a length, or raises when asked for it."""

    def __init__(self, count: int, says: int | type[Exception]) -> None:
        self.count, self.says = count, says

    def __len__(self) -> int:
        if isinstance(self.says, int):
            return self.says
        raise self.says("no length")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches(0, self.count))


@pytest.mark.parametrize("says", [3, 8])
def test_a_length_that_is_wrong_is_said_and_every_batch_is_trained_on(says: int) -> None:
    with pytest.warns(
        RuntimeWarning, match=f"the {says} batches its length says|fewer than the {says} its"
    ):
        seen = Counter().fit(Lying(5, says), "2 epochs")
    assert seen == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, RuntimeError, AttributeError])
def test_a_length_that_raises_is_none(error: type[Exception]) -> None:
    assert Counter().fit(Lying(3, error), "2 epochs") == [0, 1, 2] * 2


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loader_that_writes_over_its_batches_is_trained_on_as_it_was_read(
    sized: bool, accumulate: int
) -> None:
    class Reusing:
        memory = torch.zeros(1, 1)

        def __iter__(self) -> Iterator[Tensor]:
            for place in range(6):
                self.memory.fill_(place)
                yield self.memory

    class Sized(Reusing):
        def __len__(self) -> int:
            return 6

    assert Counter(accumulate).fit(Sized() if sized else Reusing(), "2 epochs") == [*range(6)] * 2


@dataclasses.dataclass
class Pair:
    x: Tensor
    y: Tensor


class Movable:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device, **_: Any) -> Movable:
        return Movable(self.x.to(device))


class Rows(list):  # type: ignore[type-arg]
    """A list subclass with its own constructor and attribute."""

    def __init__(self, items: Iterable[Any], source: str) -> None:
        super().__init__(items)
        self.source = source


class Cased(collections.UserDict[str, Any]):
    @property
    def x(self) -> Tensor:
        found: Tensor = self.data["x"]
        return found


Named = collections.namedtuple("Named", "x y")
X, Y = torch.ones(4, 2), torch.ones(4, 1)
IDS = [torch.ones(3, dtype=torch.long), torch.ones(2, dtype=torch.long)]
MAKES: dict[str, tuple[Any, Callable[[Any], Tensor], tuple[int, int]]] = {
    "tensor": (X, lambda b: b, (4, 4)),
    "list": ([X, Y], lambda b: b[0], (4, 4)),
    "named tuple": (Named(X, Y), lambda b: b.x, (4, 4)),
    "nested": ({"a": [{"x": X}], "n": None, "s": "text"}, lambda b: b["a"][0]["x"], (4, 4)),
    "dataclass": (Pair(X, Y), lambda b: b.x, (4, 4)),
    "object with to": (Movable(X), lambda b: b.x, (4, 4)),
    "UserDict": (Cased(x=X), lambda b: b.x, (4, 4)),
    "list subclass": (Rows([X, Y], "file"), lambda b: b[0], (4, 4)),
    "packed sequence": (pack_sequence([X[:3], X[:2]]), lambda b: b.data, (5, 5)),
    "ragged ids": ({"input_ids": IDS, "x": X}, lambda b: b["x"], (2, 5)),
    "ids of numpy": ({"input_ids": np.ones((4, 3)), "x": X}, lambda b: b["x"], (4, 12)),
    "ids in one row": ({"input_ids": IDS[0], "x": X}, lambda b: b["x"], (1, 3)),
}


@pytest.mark.parametrize("make", MAKES)
def test_batches_of_any_make_train_are_counted_and_moved(make: str) -> None:
    batch, get, (rows, tokens) = MAKES[make]
    torch.manual_seed(0)
    model, twin = nn.Linear(2, 1), nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, loss=lambda m, b: m(get(b)).square().mean())
    engine.fit([batch], until="1 steps", eval_data=[batch])
    twin(get(batch)).square().mean().backward()
    assert torch.equal(twin.weight - 0.1 * twin.weight.grad, model.weight)
    assert (engine.state.samples, engine.state.tokens) == (rows, tokens)
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert get(moved).device.type == "meta"
    assert get(batch).device.type == "cpu"
    assert getattr(moved, "source", "file") == "file"


def test_on_batch_replaces_batches_one_plugin_after_the_other() -> None:
    class DoublePlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_batch(self, batch: Tensor) -> Tensor:
            return batch * 2

    class AddPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_batch(self, batch: Tensor) -> Tensor:
            return torch.cat([batch, batch + 1])

    seen: list[float] = []
    model = nn.Linear(1, 1)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        seen.extend(batch.flatten().tolist())
        return model(batch).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, loss=loss, plugins=[DoublePlugin(), AddPlugin()])
    engine.fit(batches(3, 1), until=1)
    assert seen == [6.0, 7.0]
    assert engine.state.samples == 2


class Unsized:
    """Batches without a length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches(0, self._length))


@pytest.mark.parametrize("sized", [True, False])
@given(length=st.integers(1, 9), accumulate=st.integers(1, 4), epochs=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_last_step_of_an_epoch_may_take_what_is_left_of_it(
    sized: bool, length: int, accumulate: int, epochs: int
) -> None:
    """Fails if a step reaches into the next epoch, or its gradient is not its own mean."""
    data: Any = batches(0, length) if sized else Unsized(length)
    counter = Counter(accumulate)
    counter.engine.step_at_epoch_end = True
    places = []
    for state in counter.engine.steps(data, until=f"{epochs} epochs"):
        places.append((len(counter.seen), state.epoch))
        counter.seen.clear()
    full, rest = divmod(length, accumulate)
    sizes = [accumulate] * full + [rest] * bool(rest)
    assert [size for size, _ in places] == sizes * epochs
    assert places[-1][1] == epochs
    model = nn.Linear(1, 1)
    torch.manual_seed(0)
    model.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(epochs):
        rows = batches(0, length)
        while rows:
            step, rows = rows[:accumulate], rows[accumulate:]
            optimizer.zero_grad()
            sum(model(x).square().mean() for x in step).div(len(step)).backward()  # type: ignore[union-attr]
            optimizer.step()
    for one, other in zip(model.parameters(), counter.engine.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
