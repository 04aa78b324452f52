"""Loaders with and without their own state: resumed twice, interrupted, evaluated on.

The oracle is an undisturbed run: the same rows in the same order, bitwise equal weights (with
dropout, so that every random number counts), the same generators.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, Subset

from nexus_core import DataError, Engine, Interval, TrainState
from nexus_core.data import Stream
from nexus_core.processes import Ranks

ROWS, SIZE, STEPS = 14, 2, 17
MANY = Interval(100, "steps")


class Rows(Dataset[Tensor]):
    """Row i is i."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class Noisy(Rows):
    """Rows with random augmentation on reading."""

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + torch.rand(1) / 2


class Order(Sampler[int]):
    """Shuffles by epoch, and saves its position."""

    def __init__(self) -> None:
        self.epoch = self.at = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.at < ROWS:
            self.at += 1
            yield order[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Flow(IterableDataset[Tensor]):
    """A stream with mutable state and without a length."""

    def __init__(self) -> None:
        self.order, self.read = Order(), 0

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        for index in self.order:
            self.read += 1
            yield torch.tensor([float(index)])

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.state_dict(), "note": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state.pop("order"))


class Buffered(Flow):
    """Keeps rows in a buffer that is not in its state, like shuffle buffers."""

    def __iter__(self) -> Iterator[Tensor]:
        held: list[Tensor] = []
        for row in super().__iter__():
            held.append(row)
            if len(held) > 4:
                yield held.pop(0)
        yield from held


class Fussy(Flow):
    """Cannot load its own state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["order"]["at"]:
            raise IndexError("list index\n out of range")
        super().load_state_dict(state)


class Ahead:
    """A loader that prefetches, saves its position, and draws its seeds on first use."""

    def __init__(self) -> None:
        self._begun, self._given = 0, 0

    def __len__(self) -> int:
        return ROWS // SIZE

    def __iter__(self) -> Iterator[Tensor]:
        epoch, waiting = self._begun, list[Tensor]()
        torch.rand(1)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).float()
        for batch in order.view(-1, SIZE, 1)[self._given :]:
            waiting.append(batch)
            if len(waiting) > 2:
                self._given += 1
                yield waiting.pop(0)
        for batch in waiting:
            self._given += 1
            yield batch
        self._begun, self._given = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun, self._given = state["begun"], state["given"]


class Seekers:
    """Its iterators hold the position, as bytes."""

    def __iter__(self) -> Iterator[Tensor]:
        return SeekersIterator()


class SeekersIterator(Iterator[Tensor]):
    def __init__(self) -> None:
        self._at = 0

    def __next__(self) -> Tensor:
        if self._at == ROWS // SIZE:
            raise StopIteration
        self._at += 1
        return torch.full((SIZE, 1), float(self._at))

    def get_state(self) -> bytes:
        return str(self._at).encode()

    def set_state(self, state: bytes) -> None:
        self._at = int(state)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


MAKES: dict[str, Callable[[], Iterable[Any]]] = {
    "shuffling": lambda: DataLoader(Rows(), SIZE, shuffle=True),
    "shuffling by a generator": lambda: DataLoader(Rows(), SIZE, shuffle=True, generator=seeded()),
    "shuffling rows that draw": lambda: DataLoader(Noisy(), SIZE, shuffle=True),
    "sampler": lambda: DataLoader(Rows(), SIZE, sampler=Order()),
    "sampler of rows that draw": lambda: DataLoader(Noisy(), SIZE, sampler=Order()),
    "sampler in a batch sampler": lambda: DataLoader(
        Rows(), batch_sampler=BatchSampler(Order(), SIZE, drop_last=False)
    ),
    "sampler of subset": lambda: DataLoader(Subset(Rows(), range(ROWS)), None, sampler=Order()),
    "stream": lambda: DataLoader(Flow(), SIZE),
    "stream with a buffer": lambda: DataLoader(Buffered(), SIZE),
    "stream that cannot load": lambda: DataLoader(Fussy(), SIZE),
    "bare stream": Flow,
    "loader that reads ahead": Ahead,
    "iterators": Seekers,
}
"""Loaders by kind; each call creates one as a new process would."""
SAID = {"stream with a buffer": "a different batch", "stream that cannot load": "list index out of"}


class Run:
    """An engine that records what it trains on, created as in a new process."""

    def __init__(self, make: str, accumulate: int, snapshot: Any = None) -> None:
        self.seen: list[float] = []
        self.fails_at = 0
        torch.manual_seed(0 if snapshot is None else 99)
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.engine = Engine(model, optimizer, loss=self.loss, accumulate=accumulate)
        self.data = MAKES[make]()
        if snapshot is not None:
            self.engine.load_state_dict(snapshot)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        if model.training:
            if self.engine.state.step + 1 == self.fails_at:
                raise OSError
            self.seen += batch.flatten().tolist()
        return model(batch.view(-1, 1)).square().mean()

    def fit(self, until: int) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.engine.fit(self.data, until=f"{until} steps")
        self.said = [str(one.message) for one in said]

    def state(self) -> list[Tensor]:
        return [*self.engine.model.state_dict().values(), torch.get_rng_state()]


@cache
def undisturbed(make: str, accumulate: int) -> tuple[list[float], list[Tensor]]:
    """The oracle, trained once: the rows it reads, and its final state."""
    whole = Run(make, accumulate)
    whole.fit(STEPS)
    return whole.seen, [part.clone() for part in whole.state()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("make", MAKES)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 3))
@settings(max_examples=6, deadline=None)
def test_a_run_that_is_resumed_twice_reads_the_rows_of_one_that_is_not(
    make: str, one: int, other: int, accumulate: int
) -> None:
    """Fails if the saved position is ahead of the step, lost at an epoch's end, or outdated."""
    rows, expected = undisturbed(make, accumulate)
    seen, snapshot = list[float](), None
    for until in (*sorted((one, other)), STEPS):
        run = Run(make, accumulate, snapshot)
        run.fit(until)
        seen += run.seen
        assert all(SAID[make] in text for text in run.said)
        snapshot = copy.deepcopy(run.engine.state_dict())
    assert seen == rows
    assert same(run.state(), expected)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("step", [1, 6])
def test_a_step_that_fails_is_taken_again(make: str, accumulate: int, step: int) -> None:
    """Fails if its batches are lost because the loader has advanced."""
    rows, expected = undisturbed(make, accumulate)
    run = Run(make, accumulate)
    run.fails_at = step
    with pytest.raises(OSError):  # noqa: PT011
        run.fit(STEPS)
    run.fails_at = 0
    run.fit(STEPS)
    assert run.seen == rows
    assert same(run.state(), expected)


@pytest.mark.parametrize("make", ["sampler", "stream", "bare stream", "loader that reads ahead"])
def test_an_evaluation_on_the_same_loader_does_not_move_it(make: str) -> None:
    rows, _ = undisturbed(make, 1)
    run = Run(make, 1)
    run.engine.fit(run.data, until=f"{STEPS} steps", eval_data=run.data, eval_every="3 steps")
    assert run.seen == rows


def test_a_state_brings_the_data_back_without_reading_it_again() -> None:
    """Fails if resuming rereads the epoch up to the position."""
    first = Run("stream", 1)
    first.fit(5)
    again = Run("stream", 1, copy.deepcopy(first.engine.state_dict()))
    again.fit(6)
    assert isinstance(again.data, DataLoader)
    assert again.data.dataset.read <= 2 * SIZE  # including the batch read ahead


def test_a_data_set_that_wants_to_be_told_its_place_is_not_asked() -> None:
    class Told(Flow):
        def state_dict(self, samples: int) -> dict[str, Any]:  # type: ignore[override]
            raise AssertionError(samples)

    run = Run("stream", 1)
    run.data = DataLoader(Told(), SIZE)
    run.fit(9)


def test_an_epoch_is_told_once_to_all_that_a_loader_reads_from() -> None:
    class Told(Rows):
        def __init__(self) -> None:
            self.told: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.told.append(epoch)

    class ToldOrder(Order):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(epoch)
            self.told.append(epoch)

    rows, order = Told(), ToldOrder()
    batches = BatchSampler(order, SIZE, drop_last=False)
    run = Run("sampler", 1)
    run.data = DataLoader(Subset(rows, range(ROWS)), batch_sampler=batches)
    run.fit(2 * ROWS // SIZE)
    assert rows.told == order.told == [0, 1]


class Shared(Ahead):
    """Accepts the positions of any number of processes."""

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        self.load_state_dict({"begun": 0, "given": min(state["given"] for state in states)})


def test_each_process_gets_its_own_place_and_another_number_of_them_is_refused() -> None:
    """Fails if a process trains on the rows of another, or skips remaining ones."""
    first = Run("loader that reads ahead", 1)
    first.fit(3)
    state, data = TrainState(step=3, batch=3), first.engine.state_dict()["data"]
    assert data is not None
    assert data["loader"] is not None
    other = copy.deepcopy(data["loader"])
    other["now"]["loader"]["given"] = 5
    saved = {**data, "processes": 2, "peers": [other]}

    def row(loader: Any, rank: int, size: int) -> list[float]:
        stream = Stream(loader, state, copy.deepcopy(saved), None, Ranks(rank, size))  # type: ignore[arg-type]
        first, *_ = stream.take(1, MANY)
        return list(first.batch.flatten().tolist())

    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).float().tolist()
    assert [row(Ahead(), rank, 2) for rank in (0, 1)] == [order[6:8], order[10:12]]
    with pytest.raises(DataError, match=r"resume with 2 processes, not 3.*load_state_dicts"):
        row(Ahead(), 0, 3)
    assert row(Shared(), 2, 3) == order[6:8]
