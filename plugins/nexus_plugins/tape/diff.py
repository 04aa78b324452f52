"""Find where, in what and why two runs first differ, by tape and by repeating the step."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nexus_core.errors import NexusError, RunError
from nexus_plugins._shared.checkpoints.folder import read_manifest
from nexus_plugins.tape.again import Recorded
from nexus_plugins.tape.causes import cause, surroundings, words
from nexus_plugins.tape.facts import Fact, facts
from nexus_plugins.tape.lines import Line, differing
from nexus_plugins.tape.probe import OUTSIDE, Moment
from nexus_plugins.tape.sides import Side, Taken

__all__ = [
    "UNTOLD",
    "Finding",
    "between",
    "by_tape",
    "diff",
    "first_step",
    "largest_of",
    "steps_of",
]

PHASE_OF = {
    "batches": "batch",
    "inputs": "batch",
    "generators": "generators",
    "losses": "forward",
    "gradient": "gradient",
    "settings": "settings",
    "weights": "update",
    "optimizer": "update",
    "plugins": "end",
}
"""The phase of a step that makes a part of a line."""

_WEIGHTS = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Finding:
    """The comparison of two runs.

    Args:
        compared: the last step that both runs have.
        facts: differences in settings, code, versions, data and environment.
        step: the first differing step; None if there is none.
        phase: phase of the step: batch, generators, forward, loss, backward, gradient, settings,
            update or end.
        module: the module, or whatever else the first difference is in.
        tensor: the first differing tensor.
        about: its type and shape in both runs.
        largest: its largest difference; None if it is not numeric, or the shapes differ.
        cause: the likely cause, in words.
        repeated: whether each run's step reproduced its tape when repeated; None if unknown.
        notes: further remarks.
    """

    compared: int
    facts: Sequence[Fact] = ()
    step: int | None = None
    phase: str = ""
    module: str = ""
    tensor: str = ""
    about: tuple[str, str] = ("", "")
    largest: float | None = None
    cause: str = ""
    repeated: tuple[bool | None, bool | None] = (None, None)
    notes: Sequence[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether no step differs."""
        return self.step is None


def diff(one: Recorded, other: Recorded) -> Finding:
    """Compare two runs.

    Raises:
        RunError: they have nothing in common to compare.
    """
    found = facts(one, other)
    common = sorted(one.tape.lines.keys() & other.tape.lines.keys())
    if common:
        step = first_step(one.tape.lines, other.tape.lines, common)
        if step is None:
            return Finding(common[-1], found, notes=_lengths(one, other))
        return _taken_apart(one, other, step, common[-1], found)
    begin, end = _by_checkpoints(one, other)
    if begin == end:
        return Finding(end, found, notes=["compared by checkpoints, as there are no tapes"])
    step = _first_again(one, other, begin, end)
    if step is None:
        said = f"between steps {begin} and {end}, but not when both runs are re-executed"
        return Finding(end, found, begin + 1, cause=f"the runs diverged {said}; {UNTOLD}")
    return _taken_apart(one, other, step, end, found)


UNTOLD = (
    "the cause is not in their configs: a hardware fault, code that has changed "
    "since, or outside interference"
)
"""Why steps may differ that agree when re-executed."""


def first_step(
    one: Mapping[int, Line], other: Mapping[int, Line], common: Sequence[int]
) -> int | None:
    """The first step in both tapes at which they differ; by bisection.

    Two lines with the same chain digest have the same history. If the tapes start at different
    steps, or record different levels, every line is compared.
    """
    if one[common[0]]["chain"] == other[common[0]]["chain"]:
        place = bisect_left(common, True, key=lambda s: one[s]["chain"] != other[s]["chain"])
        common = common[place:]
    return next((step for step in common if differing(one[step], other[step])), None)


def _taken_apart(
    one: Recorded, other: Recorded, step: int, compared: int, found: list[Fact]
) -> Finding:
    """Repeat the step in both runs, and find the first value that differs."""
    lines = one.tape.lines.get(step), other.tape.lines.get(step)
    try:
        with Side(one) as mine, Side(other) as theirs:
            finding = between(mine, theirs, lines, step, compared, found)
        unknown = (run.unknown(run.before(step - 1), step) for run in (one, other))
        return replace(finding, notes=[*finding.notes, *chain(*unknown)])
    except NexusError as error:  # such as local code that is not trusted
        if None in lines:
            raise
        finding = by_tape(lines, step, compared, found)
        return Finding(**{**vars(finding), "notes": [f"not re-executed: {error}"]})


def between(
    mine: Side,
    theirs: Side,
    lines: tuple[Line | None, Line | None],
    step: int,
    compared: int,
    found: list[Fact],
) -> Finding:
    """Repeat a step on both sides, and find the first value that differs.

    Args:
        mine: one side.
        theirs: the other side.
        lines: of both tapes, if any.
        step: its number.
        compared: the last step that both runs have.
        found: what is known to differ.
    """
    taken = _both(mine, theirs, step)
    repeated = _repeats(lines[0], taken[0], step), _repeats(lines[1], taken[1], step)
    earlier = _earlier(taken, step)
    if earlier is not None:
        taken, step = _both(mine, theirs, earlier), earlier
    notes = [*dict.fromkeys([*taken[0].notes, *taken[1].notes])]
    places = _first(taken[0].moments, taken[1].moments)
    if places is None or False in repeated:
        if None not in lines:
            return by_tape(lines, step, compared, found, repeated, notes)
        why = f"re-executed, both runs take the same step; {UNTOLD}"
        return Finding(compared, found, step, cause=why, repeated=repeated, notes=notes)
    if _is_computed(taken[0].moments[places[0]]):
        closer = _both(mine, theirs, step, operations=True)
        inner = _first(closer[0].moments, closer[1].moments)
        if inner is not None and closer[0].moments[inner[0]].module != OUTSIDE:
            taken, places = closer, inner
        else:  # the recorded step
            taken = _both(mine, theirs, step)
    pair = taken[0].moments[places[0]], taken[1].moments[places[1]]
    values = mine.value(places[0]), theirs.value(places[1])
    moment = pair[0]
    return Finding(
        compared,
        found,
        step,
        moment.phase,
        moment.module,
        moment.name,
        (pair[0].about, pair[1].about),
        largest_of(*values),
        cause(pair, values, found),
        repeated,
        notes,
    )


def _is_computed(moment: Moment) -> bool:
    """Whether it is the result of operations, so that the first differing one can be found."""
    return moment.phase == "forward" or (moment.phase, moment.name) == ("loss", "mean")


def _both(mine: Side, theirs: Side, step: int, *, operations: bool = False) -> tuple[Taken, Taken]:
    for side in (mine, theirs):
        side.begin(step, operations=operations)
    return mine.taken(), theirs.taken()


def _repeats(line: Line | None, taken: Taken, step: int) -> bool | None:
    """Whether a repeated step reproduced its tape line."""
    return None if line is None else not differing(line, taken.lines[step])


def _earlier(taken: tuple[Taken, Taken], step: int) -> int | None:
    """An earlier step that already differs, which coarser tapes did not show."""
    one, other = (t.lines for t in taken)
    common = sorted(s for s in one.keys() & other.keys() if s < step)
    return next((s for s in common if differing(one[s], other[s])), None)


def _first(one: Sequence[Moment], other: Sequence[Moment]) -> tuple[int, int] | None:
    """The indices of the first common moment that differs."""
    there = {moment.key: place for place, moment in enumerate(other)}
    for place, moment in enumerate(one):
        match = there.get(moment.key)
        if match is not None and other[match].digest != moment.digest:
            return place, match
    return None


def by_tape(
    lines: tuple[Line | None, Line | None],
    step: int,
    compared: int,
    found: list[Fact],
    repeated: tuple[bool | None, bool | None] = (None, None),
    notes: Sequence[str] = (),
) -> Finding:
    """What the tapes alone say about a step."""
    assert lines[0] is not None
    assert lines[1] is not None
    parts = differing(lines[0], lines[1])
    part, names = next(iter(parts.items()))
    odd = [name for name, same in zip("AB", repeated, strict=True) if same is False]
    if len(odd) == 1:
        why = (
            f"re-executed, run {odd[0]} differs from its tape, and the other one does not: "
            "the cause is not in its config: a hardware fault, code that has "
            "changed since, or outside interference"
        )
    elif odd:
        why = "re-executed here, neither run matches its tape" + surroundings(found)
    else:
        why = words(PHASE_OF[part], "", found)
    largest = None
    if part == "losses":
        numbers = [[float(line[part][n]) for n in names] for line in lines if line is not None]
        largest = max(abs(a - b) for a, b in zip(*numbers, strict=True))
    return Finding(
        compared,
        found,
        step,
        PHASE_OF[part],
        ", ".join(names),
        part,
        largest=largest,
        cause=why,
        repeated=repeated,
        notes=notes,
    )


def largest_of(one: Tensor | None, other: Tensor | None) -> float | None:
    """The largest difference of two tensors; None if they cannot be compared."""
    if one is None or other is None or one.shape != other.shape or not one.numel():
        return None
    kind = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    return float((one.to(kind) - other.to(kind)).abs().max())


def _lengths(one: Recorded, other: Recorded) -> list[str]:
    ends = [max(run.tape.lines, default=0) for run in (one, other)]
    if ends[0] == ends[1]:
        return []
    return [f"A ends at step {ends[0]}, B at step {ends[1]}; identical in all common steps"]


def _by_checkpoints(one: Recorded, other: Recorded) -> tuple[int, int]:
    """The last common checkpoint that is equal, and the first after it that differs."""
    common = sorted(one.saved.keys() & other.saved.keys())
    if not common:
        end = min(steps_of(one), steps_of(other))
        if not end:
            raise RunError("the runs have no tapes, and no checkpoint of a common step")
        return 0, end
    last = 0
    for step in common:
        hashes = [read_manifest(run.saved[step]).files for run in (one, other)]
        if any(hashes[0].get(name) != hashes[1].get(name) for name in _WEIGHTS):
            return last, step
        last = step
    return last, last


def _first_again(one: Recorded, other: Recorded, begin: int, end: int) -> int | None:
    with Side(one) as mine, Side(other) as theirs:
        for side in (mine, theirs):
            side.begin(end, begin=begin)
        lines = mine.taken().lines, theirs.taken().lines
    common = sorted(lines[0].keys() & lines[1].keys())
    return next((s for s in common if differing(lines[0][s], lines[1][s])), None)


def steps_of(run: Recorded) -> int:
    """The number of steps of a run, from its summary or its checkpoints."""
    try:
        found: Any = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
        return int(found["steps"])
    except (OSError, ValueError, LookupError, TypeError):
        return max(run.saved, default=0)
