"""The loader: a wrong order would repeat or skip samples, and make resuming inexact."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nexus_core import DataError, Interval, ResumableLoader, TrainState
from nexus_core.bases.loader import permute
from nexus_core.batches import batch_size, to_device
from nexus_core.data import Stream
from nexus_core.processes import Ranks


class Squares:
    """Sample i is i squared."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(index * index)}


@given(st.integers(1, 20_000), st.integers(-(2**70), 2**70), st.integers(0, 5))
def test_permutation_is_a_bijection_for_any_size(size: int, seed: int, epoch: int) -> None:
    places = np.arange(size, dtype=np.int64)
    order = permute(places, size, seed, epoch)
    assert np.array_equal(np.sort(order), places)


@given(st.integers(2, 10**12), st.integers(0, 2**32), st.data())
def test_permutation_of_a_part_is_the_part_of_the_permutation(
    size: int, seed: int, data: st.DataObject
) -> None:
    """Seeking reads the same samples as iterating up to the position."""
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)))
    together = permute(places, size, seed, 0)
    one_by_one = [permute(np.array([place]), size, seed, 0)[0] for place in places]
    assert together.tolist() == one_by_one
    assert together.max() < size


@pytest.mark.parametrize("size", [1000, 30_000])
def test_positions_are_uniform_and_epochs_independent(size: int) -> None:
    """Chi-square of the first tenth's positions, and correlation of two epochs' orders."""
    places = np.arange(size, dtype=np.int64)
    first, second = permute(places, size, 1, 0), permute(places, size, 1, 1)
    counts = np.bincount(first[: size // 10] * 10 // size, minlength=10)
    expected = size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # p = 0.001 at 9 degrees of freedom
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / size**0.5
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / size**0.5


def ids(batches: Iterable[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["sample_ids"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_sought_batches_equal_those_read_through_for_any_number_of_workers(workers: int) -> None:
    plain = ResumableLoader(Squares(23), 4, seed=9)
    loader = ResumableLoader(Squares(23), 4, seed=9, num_workers=workers)
    for epoch, start in [(0, 0), (1, 3), (0, 5)]:
        expected = ids(plain.batches(epoch))[start:]
        batches = list(loader.batches(epoch, start))
        assert [batch["sample_ids"].tolist() for batch in batches] == expected
        for batch in batches:
            assert torch.equal(batch["x"], batch["sample_ids"] ** 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_can_be_read_side_by_side(workers: int) -> None:
    """Fails if evaluating on the training data changes the batches of training."""
    plain = ResumableLoader(Squares(23), 4, seed=9)
    loader = ResumableLoader(Squares(23), 4, seed=9, num_workers=workers)
    training = loader.batches(0)
    read = [next(training)]
    assert ids(loader.batches(3)) == ids(plain.batches(3))
    unread = loader.batches(5)
    read += training
    assert ids(read) == ids(plain.batches(0))
    assert ids(unread) == ids(plain.batches(5))


class Torn(Squares):
    """A data set with one sample that cannot be read."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 5:
            raise DataError("file.txt is torn at byte 5")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_says_the_same_wherever_it_is_read(workers: int) -> None:
    """Fails if a worker's traceback replaces the clear message."""
    batches = ResumableLoader(Torn(8), 2, shuffle=False, num_workers=workers).batches(epoch=0)
    assert [len(next(batches)["x"]), len(next(batches)["x"])] == [2, 2]
    with pytest.raises(DataError, match=r"^file.txt is torn at byte 5$") as raised:
        next(batches)
    inner = (frame for frame, _ in walk_tb(raised.tb.tb_next))
    assert not any(raised.value in frame.f_locals.values() for frame in inner), "no cycle"
    del raised, inner  # which know this frame: collecting them would wait for the workers


def test_epoch_holds_every_sample_once_and_unshuffled_keeps_the_order() -> None:
    loader = ResumableLoader(Squares(23), 4, seed=1)
    assert sorted(sum(ids(loader), [])) == list(range(23))
    straight = ResumableLoader(Squares(23), 4, shuffle=False)
    assert sum(ids(straight), []) == list(range(23))
    assert len(ids(ResumableLoader(Squares(23), 4, drop_last=True))) == 5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_the_order_of_one(size: int) -> None:
    """The global order does not depend on the number of processes."""
    alone = ids(ResumableLoader(Squares(23), 6, seed=2))
    shares = [ResumableLoader(Squares(23), 6, seed=2, ranks=Ranks(r, size)) for r in range(size)]
    assert [sum(parts, []) for parts in zip(*map(ids, shares), strict=True)] == alone


@pytest.mark.slow
def test_loader_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(ResumableLoader(Squares(9), 4, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        ResumableLoader(Squares(0), 4)
    with pytest.raises(DataError, match="too few"):
        ResumableLoader(Squares(3), 4, drop_last=True)


FAR = Interval(10**6, "steps")


def stream_of(data: object, state: TrainState | None = None) -> Stream:
    return Stream(data, state or TrainState(), None, known=True, ranks=Ranks())


def taken(stream: Stream, count: int, horizon: Interval = FAR) -> list[Any]:
    return [micro.batch for micro in stream.take(count, horizon)]


class Unsized:
    """Data without a length."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[int]:
        return iter(self.batches)


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 39), st.booleans())
def test_stream_continues_where_it_stopped(length: int, count: int, stop: int, sized: bool) -> None:
    """For data with and without a length: the same batches in order."""
    data = list(range(length)) if sized else Unsized(list(range(length)))
    stream = stream_of(data)
    got = taken(stream, min(stop, count))
    state = TrainState(epoch=stream.place.epoch, batch=stream.place.batch)
    assert got + taken(stream_of(data, state), count - len(got)) == [
        i % length for i in range(count)
    ]


@pytest.mark.parametrize("data", [[1, 2, 3, 4], Unsized([1, 2, 3, 4])])
def test_stream_ends_with_the_horizon_in_epochs(data: object) -> None:
    stream = stream_of(data)
    assert taken(stream, 99, Interval(2, "epochs")) == [1, 2, 3, 4] * 2
    assert (stream.place.epoch, stream.place.batch) == (2, 0)


def test_stream_of_data_that_cannot_be_read_again_is_an_error() -> None:
    for data in (iter([1, 2]), []):
        with pytest.raises(DataError, match="the data ended"):
            taken(stream_of(data), 9)


def test_what_can_be_read_once_is_enough_for_an_epoch() -> None:
    """Fails if a generator ends a run of one epoch with an error, or an empty one does not."""
    for data in (iter([1, 2, 3]), (n for n in [1, 2, 3])):
        stream = stream_of(data)
        assert taken(stream, 99, Interval(1, "epochs")) == [1, 2, 3]
        assert stream.place.epoch == 1
    with pytest.raises(DataError, match="after 0 batches"):
        taken(stream_of(iter([])), 1, Interval(1, "epochs"))


def test_batch_size_counts_rows_and_tokens() -> None:
    assert batch_size({"input_ids": torch.zeros(3, 7)}) == (3, 21)
    assert batch_size((torch.zeros(5, 2), torch.zeros(5))) == (5, 5)
    assert batch_size([{"name": "a", "x": torch.zeros(4)}]) == (4, 4)
    assert batch_size({"names": ["a", "b"]}) == (1, 1)


def test_to_device_gives_containers_that_may_be_changed() -> None:
    batch = {"x": torch.ones(2), "meta": ["a", (torch.ones(1),)]}
    moved = to_device(batch, torch.device("cpu"))
    moved["x"] = None
    moved["meta"].append("b")
    assert batch["x"] is not None
    assert len(batch["meta"]) == 2


class Whose(Squares):
    """Sample i names the process that read it."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(index), "pid": torch.tensor(os.getpid())}


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_workers_leave_signals_to_the_process_that_trains(method: str) -> None:
    """Fails if Ctrl-C or a signal to the group kills workers before the last step is saved.

    Some signals come while the workers are still being started.
    """
    before, others = multiprocessing.get_start_method(), multiprocessing.active_children()
    multiprocessing.set_start_method(method, force=True)
    # a fork server started by another test would not block signals in its children
    getattr(forkserver, "_forkserver")._stop()  # noqa: B009
    try:
        loader = ResumableLoader(Whose(60), 4, num_workers=2, prefetch=1, shuffle=False)
        batches = loader.batches(0)
        workers = {c.pid for c in multiprocessing.active_children() if c not in others}
        for pid in workers:
            os.kill(pid or 0, signal.SIGTERM)
        seen = set[int]()
        for batch in batches:
            for pid in set(batch["pid"].tolist()) - seen:
                seen.add(pid)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                    os.kill(pid, number)
        assert seen == workers
        assert workers <= {child.pid for child in multiprocessing.active_children()}
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("read", [1, 99])
def test_workers_of_a_loader_that_is_dropped_end_with_it(read: int) -> None:
    """Fails if this takes a garbage collection, which waits for each worker."""
    others = {child.pid for child in multiprocessing.active_children()}
    gc.disable()
    try:
        loader = ResumableLoader(Squares(20), 4, num_workers=2)
        batches = loader.batches(0)
        for _ in itertools.islice(batches, read):
            pass
        batches.close()  # type: ignore[attr-defined]
        del loader, batches
        assert {child.pid for child in multiprocessing.active_children()} <= others
    finally:
        gc.enable()


KILLED = """
import multiprocessing, os, signal, sys
import torch
from nexus_core import ResumableLoader
class Rows:
    def __len__(self):
        return 400
    def __getitem__(self, index):
        return {"pid": torch.tensor(os.getpid())}
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = iter(ResumableLoader(Rows(), 4, num_workers=2, prefetch=1, shuffle=False))
    pids = {int(next(batches)["pid"][0]) for _ in range(4)}
    print(*pids, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_end_with_a_process_that_is_killed(method: str, tmp_path: Path) -> None:
    """Fails if a killed run leaves processes behind."""
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run(
        [sys.executable, "killed.py", method],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    pids = done.stdout.split()
    assert len(pids) == 2
    end = time.monotonic() + 30
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < end, f"{left} live on"


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_another_order_is_taken_from_any_row_on_and_shared_by_processes() -> None:
    """Samples may occur twice in an epoch; the order gets positions, seed and epoch."""

    def order(places: Any, size: int, seed: int, epoch: int) -> Any:
        return (places // 2 * seed + epoch) % size

    whole = ResumableLoader(list(range(10)), 4, seed=3, order=order)
    rows = [int(row) for batch in whole.batches(2) for row in batch]
    assert rows == [(place // 2 * 3 + 2) % 10 for place in range(10)]
    assert [int(row) for batch in whole.batches_from_row(2, 4) for row in batch] == rows[4:]
    shares = [
        ResumableLoader(list(range(10)), 4, seed=3, order=order, ranks=Ranks(rank, 2))
        for rank in range(2)
    ]
    pairs = zip(*(share.batches(2) for share in shares), strict=True)
    assert [int(row) for pair in pairs for share in pair for row in share] == rows
