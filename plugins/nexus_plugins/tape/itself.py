"""Find where, in what and why a run first differs from its own re-execution."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest

from torch import Tensor

from nexus_core.cli.recorded import without_watchers
from nexus_core.errors import CheckpointError, RunError
from nexus_plugins.tape import parts
from nexus_plugins.tape.again import Again, Recorded, executed, intervals
from nexus_plugins.tape.audit import OddMetric, depth_of, odd_metrics
from nexus_plugins.tape.diff import UNTOLD, Finding, between, by_tape, largest_of, steps_of
from nexus_plugins.tape.facts import Fact, since
from nexus_plugins.tape.lines import differing
from nexus_plugins.tape.sides import Side

__all__ = ["diff_itself"]

CHANGED = "the step is reproduced, but this is not: it was changed after it was written"
_STATE = ("model", "optimizer", "random", "data", "plugins")


def diff_itself(recorded: Recorded) -> Finding:
    """Re-execute a run from its start and from each checkpoint, up to the first difference.

    Raises:
        RunError: it left nothing to compare, or ends earlier than recorded.
        ConfigError: it cannot be re-executed.
    """
    found, notes, end = list[Fact](), dict[str, None](), 0
    for begin, end in _parts(recorded):
        again = executed(recorded, begin, end, modules=depth_of(recorded, end))
        found = since(recorded, again.engine)
        notes |= dict.fromkeys(again.notes)
        finding = _first(recorded, again, begin, end, found)
        if finding is not None:
            return replace(finding, notes=[*notes, *finding.notes])
    return Finding(end, found, notes=[*notes])


def _parts(recorded: Recorded) -> Iterator[tuple[int, int]]:
    """The parts of a run between its checkpoints, and the part after the last one."""
    yield from intervals(recorded)
    last = max(recorded.saved, default=recorded.first)
    logs = (recorded.folder / "metrics.jsonl").exists()
    end = max(max(recorded.tape.lines, default=0), steps_of(recorded) if logs else 0)
    if end > last:
        yield last, end
    elif not recorded.saved:
        raise RunError(
            f"'{recorded.folder}' has no tape, checkpoint or metrics.jsonl, so there is "
            "nothing to compare a re-execution with; train with the plugin tape, or save"
        )


def _first(
    recorded: Recorded, again: Again, begin: int, end: int, found: list[Fact]
) -> Finding | None:
    """The first difference in a part of the run; None if there is none."""
    tape = recorded.tape.lines
    steps = (s for s in range(begin + 1, end + 1) if s in tape and s in again.lines)
    step = next((s for s in steps if differing(tape[s], again.lines[s])), None)
    engine = again.engine
    over = engine.horizon is not None and engine.horizon.reached(engine.state)
    done = end in recorded.saved or over  # a stopped run has an additional last log
    metric = next(odd_metrics(recorded, again, begin, end if done else end - 1), None)
    if step is not None and (metric is None or step <= metric.step):
        return _by_line(recorded, again, step, end, found)
    if metric is not None:
        return _by_metric(metric, metric.step in tape, end, found, _untold(recorded, begin, end))
    return _by_checkpoint(recorded, again, begin, end, found) if end in recorded.saved else None


def _by_line(recorded: Recorded, again: Again, step: int, end: int, found: list[Fact]) -> Finding:
    """A step that differs; it is executed twice more, to see whether it always does."""
    with Side(recorded) as one, Side(recorded) as other:
        twice = between(one, other, (None, None), step, end, found)
    if twice.phase:
        why = f"re-executed twice, it differs each time: {twice.cause}"
        return replace(twice, cause=why)
    lines = recorded.tape.lines[step], again.lines[step]
    finding = by_tape(lines, step, end, found)
    why = "re-executed, the step is reproducible but differs from its tape"
    known = finding.cause if found else _untold(recorded, recorded.before(step - 1), end)
    return replace(finding, cause=f"{why}: {known}", repeated=(False, None))


def _untold(recorded: Recorded, begin: int, end: int) -> str:
    """Why a part of the run may differ for no known reason."""
    return "; ".join(recorded.unknown(begin, end)) or UNTOLD


def _by_metric(metric: OddMetric, taped: bool, end: int, found: list[Fact], untold: str) -> Finding:
    then, now = metric.values
    return Finding(
        end,
        found,
        metric.step,
        "metrics",
        "metrics.jsonl",
        metric.name or "the line of the step",
        ("" if then is None else f"{then!r}", "" if now is None else f"{now!r}"),
        None if then is None or now is None else abs(then - now),
        CHANGED if taped else untold,
        (taped or None, None),
        [str(metric)],
    )


def _by_checkpoint(
    recorded: Recorded, again: Again, begin: int, end: int, found: list[Fact]
) -> Finding | None:
    """How a checkpoint differs from the run re-executed up to it."""
    engine, path, taped = again.engine, recorded.saved[end], end in recorded.tape.lines
    state = engine.state_dict()  # reading a checkpoint changes the plugin that reads it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about added and missing observers
            snapshot = engine.hook.load_snapshot(engine=engine, source=str(path))
    except CheckpointError as error:
        return Finding(end, found, end, "checkpoint", path.name, cause=str(error))
    watching = {n: bool(getattr(p, "only_watches", False)) for n, p in engine.plugins.items()}
    both = without_watchers(snapshot, watching), without_watchers(state, watching)
    then, now = ({part: side.get(part) for part in _STATE} for side in both)
    odd = _odd_leaf(then, now)
    if odd is None:
        return None
    place, values = odd
    why = (
        CHANGED
        if taped
        else f"it diverged between steps {begin} and {end}; {_untold(recorded, begin, end)}"
    )
    tensors = [value if isinstance(value, Tensor) else None for value in values]
    return Finding(
        end,
        found,
        end if taped else begin + 1,
        "checkpoint",
        path.name,
        place,
        (_about(values[0]), _about(values[1])),
        largest_of(*tensors),
        why,
        (taped or None, None),
    )


def _odd_leaf(
    then: Mapping[str, object], now: Mapping[str, object]
) -> tuple[str, tuple[object, object]] | None:
    """The first value that differs between two trees, with its path."""
    for one, other in zip_longest(parts.leaves_of(then), parts.leaves_of(now)):
        if one is None or other is None or one[0] != other[0]:
            return (one or other)[0], (one and one[1], other and other[1])
        if parts.of_tree(one[1]) != parts.of_tree(other[1]):
            return one[0], (one[1], other[1])
    return None


def _about(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "" if value is None else f"{value!s:.60}"
