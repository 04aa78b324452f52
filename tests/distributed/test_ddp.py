"""Two processes train like one: the same numbers, the same samples, one common end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.early_stop import EarlyStopPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.guard import GuardPlugin
from tests.distributed.processes import together
from tests.distributed.works import (
    BUFFERS,
    fail_alone,
    give_up,
    play,
    read_apart,
    refused,
    search,
    share,
    train,
    train_apart,
    train_on_own_rows,
    train_with,
)


def more(*values: object) -> list[ParameterSet]:
    """Further cases, marked slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("accumulate", [2, *more(1)])
def test_two_processes_get_the_numbers_of_one(accumulate: int) -> None:
    """Fails if losses, weights, samples, counters or evaluations depend on the number of processes.

    Labels are ragged, 23 samples leave a last batch of 5, and 11 a last evaluation batch of 3.
    """
    work = partial(train, 50, accumulate=accumulate, eval_every=20)
    alone, pair = work(), together(2, work)
    for seen in pair:
        assert seen.losses == pytest.approx(alone.losses, rel=1e-6)
        assert len(seen.losses) == 50
        assert [e["val/loss"] for e in seen.evaluations] == pytest.approx(
            [e["val/loss"] for e in alone.evaluations], rel=1e-5
        )
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)
        assert (seen.samples, seen.tokens) == (alone.samples, alone.tokens)
    for step, ids in enumerate(alone.ids):
        assert sorted(pair[0].ids[step] + pair[1].ids[step]) == sorted(ids)


@pytest.mark.parametrize("sizes", [(2, 2), *more((2, 1), (1, 3))], ids=str)
def test_a_run_goes_on_with_other_processes(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Fails if a resumed run has other samples or losses than an uninterrupted one.

    Dropout is on if the number of processes is unchanged, to test their generators too.
    """
    dropout = 0.2 if sizes[0] == sizes[1] else 0.0
    whole = together(sizes[0], partial(train, 20, dropout=dropout))[0]
    saved = partial(train, 20, dropout=dropout, out=tmp_path / "run", every=7)
    first = together(sizes[0], partial(saved, stop_at=16))
    assert {seen.step for seen in first} == {16}
    second = together(sizes[1], partial(saved, resume=True))
    tolerance = 0.0 if dropout else 1e-5
    assert second[0].losses == pytest.approx(whole.losses[16:], rel=tolerance)
    assert second[0].weights == pytest.approx(whole.weights, rel=tolerance)
    assert second[0].samples == whole.samples
    ids = [
        [i for seen in part for i in seen.ids[step]] for part, step in ((first, 15), (second, 16))
    ]
    expected = train(18).ids
    assert [sorted(found) for found in ids] == [sorted(expected[15]), sorted(expected[16])]


def test_all_end_where_one_wants_to(tmp_path: Path) -> None:
    """Fails if a stop in one process leaves the others waiting, or loses its reason."""
    for seen in together(2, partial(train, 1000, stop_at=4, stop_rank=1)):
        assert (seen.status, seen.reason, seen.step) == ("stopped", "rank 1 stops", 4)


def test_time_is_that_of_the_main_process() -> None:
    """Fails if processes use their own clocks and end at different steps."""
    first, second = together(2, partial(train, "0.5 s"))
    assert (first.step, first.seconds) == (second.step, second.seconds)
    assert first.status == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("find_unused", [None, True])
def test_a_layer_that_no_loss_reaches_is_left_alone(find_unused: bool | None) -> None:
    """Fails if the gradient sum waits for one that never arrives, or invents one."""
    plugin = partial(DdpPlugin, timeout=20, find_unused=find_unused)
    alone = train(6, unreached=True)
    for seen in together(2, partial(train_with, plugin, 6, unreached=True)):
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_a_batch_of_fewer_rows_than_processes_counts_each_row_once() -> None:
    """Fails if a last batch of one row ends the run or counts twice (25 in sixes, 9 in fours)."""
    work = partial(train, 12, size=25, eval_every=6)
    alone = work()
    for seen in together(3, work):
        assert seen.losses == pytest.approx(alone.losses, rel=1e-5)
        assert seen.samples == alone.samples
        assert seen.evaluations[-1]["val/loss"] == pytest.approx(
            alone.evaluations[-1]["val/loss"], rel=1e-5
        )


def test_an_early_stop_comes_at_the_step_at_which_it_comes_alone() -> None:
    """Fails if processes continue after an evaluation that should stop them."""
    work = partial(train, 60, partial(EarlyStopPlugin, patience=2, min_delta=100.0), eval_every=3)
    alone = work()
    for seen in together(2, work):
        assert (seen.status, seen.step, seen.reason) == ("stopped", 9, alone.reason)
        assert alone.step == seen.step


@pytest.mark.slow
def test_clip_guard_and_average_see_the_gradient_of_all() -> None:
    """Fails if a plugin reads the gradient before it is summed, or only a share of it."""
    work = partial(train, 12, partial(ClipPlugin, max_norm=0.1), GuardPlugin, EmaPlugin)
    alone = work()
    for seen in together(2, work):
        assert seen.losses == pytest.approx(alone.losses, rel=1e-5)
        assert seen.evaluations[-1]["val/loss"] == pytest.approx(
            alone.evaluations[-1]["val/loss"], rel=1e-5
        )


def test_processes_that_find_different_checkpoints_do_not_go_on(tmp_path: Path) -> None:
    """Fails if a machine without the shared folder starts from scratch next to one that resumes."""
    train(6, out=tmp_path / "0")
    with pytest.raises(AssertionError, match="rank 0 step 6, rank 1 step -1"):
        together(2, partial(train_apart, tmp_path))


@pytest.mark.slow
def test_turns_are_refused_by_name_and_a_second_look_at_the_gradient_is_summed() -> None:
    """Fails if alternating optimizers diverge between ranks, or LBFGS sees one rank's gradient."""
    for errors in together(2, partial(refused, play)):
        assert (
            "ddp sums one gradient per step, but optimizers take turns here ('hidden')" in errors[0]
        )
    alone = search()
    for weights in together(2, search):
        assert weights == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_each_process_resumes_at_the_place_of_its_own_loader(tmp_path: Path) -> None:
    """Fails if a process gets rank 0's position, or another number of processes is accepted."""
    whole = together(2, train_on_own_rows, 30, tmp_path / "whole")
    pieces = [together(2, train_on_own_rows, until, tmp_path / "run") for until in (7, 24, 30)]
    for rank, seen in enumerate(whole):
        ids = [one for piece in pieces for one in piece[rank].ids if one]
        assert ids == seen.ids
        assert pieces[-1][rank].weights == seen.weights
    (alone,) = together(1, train_on_own_rows, 31, tmp_path / "run")
    assert "resume with 2 processes, not 1" in alone.reason


LONG = [
    ((100, 100), 11, ("SIGTERM", [17, 17], ["evaluate"])),  # at the next exchange
    ((100, 3), None, ("finished", [100, 3], [])),  # one process finishes long before
    ((100, 3), 3, ("SIGTERM", [9, 3], ["evaluate"])),
]


@pytest.mark.parametrize("case", [LONG[0], *more(*LONG[1:])], ids=str)
def test_an_evaluation_is_given_up_by_all_at_one_batch(case: Any) -> None:
    """Fails if a signal waits for a long evaluation, or processes leave it at different batches."""
    sizes, stops_at, (end, read, owed) = case
    found = together(2, partial(give_up, sizes, stops_at))
    assert found == [(end, count, owed) for count in read]


def test_buffers_of_any_kind_are_shared_or_named() -> None:
    """Fails if an unsupported dtype ends the run, or a buffer is not that of rank 0."""
    for answer in together(2, share):
        assert answer == {name: values.float().tolist() for name, values in BUFFERS.items()}
    for errors in together(2, partial(refused, partial(share, "edges"))):
        assert "the model's buffer 'edges' is sparse_coo" in errors[0]


def test_a_process_that_waits_for_one_that_failed_knows_why() -> None:
    """Fails if a layer skipped by one process crashes the other, or is not named."""
    waiting, failed = together(2, fail_alone)
    what = "ddp: in step 3 the loss does not reach all parameters that it reached before (such as "
    assert failed.startswith(f"ConfigError: {what}'hidden.bias', one of 1)")
    assert waiting.startswith("RuntimeError")
    assert f"rank 1 of 2 has ended with ConfigError: {what}'hidden.bias', one of 1)" in waiting


@pytest.mark.slow
def test_data_of_other_lengths_is_refused() -> None:
    """Fails if a process without further data leaves the others waiting."""
    for errors in together(2, partial(refused, read_apart)):
        assert "an epoch has 3, 4 batches in ranks 0 to 1" in errors[0]
