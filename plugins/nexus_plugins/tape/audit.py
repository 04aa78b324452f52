"""Re-executes random parts of a run and compares them with what the run recorded."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nexus_core.cli.digests import Digester, hexadecimal
from nexus_core.cli.recorded import UntrustedError, config_of, settings_in, without_watchers
from nexus_core.errors import CheckpointError, NexusError
from nexus_core.intervals import Interval
from nexus_core.snapshot import Snapshot
from nexus_plugins.tape import parts
from nexus_plugins.tape.again import Again, Recorded, executed, intervals
from nexus_plugins.tape.lines import differing

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Audit", "OddMetric", "Segment", "audit", "depth_of", "odd_metrics", "unseen"]

_OF_CLOCKS = ("seconds", "time")
_STATE = ("model", "optimizer", "random", "data", "plugins")


@dataclass(frozen=True)
class OddMetric:
    """An entry of `metrics.jsonl` that re-execution does not reproduce.

    Args:
        step: step of the line.
        name: name of the metric; empty for the whole line.
        said: what is wrong with it.
        values: in the file, and on re-execution; None if missing.
    """

    step: int
    name: str
    said: str
    values: tuple[float | None, float | None] = (None, None)

    def __str__(self) -> str:
        if not self.name:
            return f"metrics.jsonl: the line of step {self.step} {self.said}"
        return f"metrics.jsonl, step {self.step}: {self.name} {self.said}"


@dataclass(frozen=True)
class Segment:
    """A part of a run that was re-executed.

    Args:
        begin: the step of the checkpoint that it starts from, or of the run's beginning.
        end: the step of the checkpoint that it ends with.
        faults: what was not reproduced, in words.
        notes: how the rebuilt run differs from the original.
    """

    begin: int
    end: int
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass
class Audit:
    """The result of an audit.

    Args:
        of: the number of intervals in the run.
        intervals: those that were re-executed.
        faults: faults of the recorded files: tape and checkpoints.
    """

    of: int
    intervals: list[Segment] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether everything was reproduced."""
        return not self.faults and not any(part.faults for part in self.intervals)


def unseen(share: float, segments: int) -> float:
    """The probability that a random sample of intervals misses a given share of false ones."""
    return math.pow(1 - share, segments)


def audit(recorded: Recorded, segments: int, seed: int | None = None) -> Audit:
    """Re-execute randomly chosen intervals between checkpoints.

    Args:
        recorded: the run.
        segments: how many; all of them if there are fewer.
        seed: seed of the random choice; None: unpredictable.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    found = list(intervals(recorded))
    if not found:
        raise CheckpointError(
            f"'{recorded.folder}' has no checkpoint to re-execute from; an audit needs "
            "a run with checkpoints (checkpoint.every)"
        )
    drawn = sorted(Random(seed).sample(found, min(segments, len(found))))
    report = Audit(len(found))
    if (step := recorded.tape.broken()) is not None:
        report.faults.append(f"the tape was changed: its chain breaks at step {step}")
    for begin, end in drawn:
        report.intervals.append(_again(recorded, begin, end))
    return report


def _again(recorded: Recorded, begin: int, end: int) -> Segment:
    try:
        again = executed(recorded, begin, end, modules=depth_of(recorded, end))
    except UntrustedError:
        raise  # it says nothing about the run
    except NexusError as error:
        return Segment(begin, end, [f"it cannot be re-executed: {error}"])
    faults = [*_lines(recorded, again, begin, end)]
    faults += map(str, odd_metrics(recorded, again, begin, end))
    now = again.engine.state_dict()  # reading a checkpoint changes the plugin that reads it
    for step in [at for at in (begin, end) if at in recorded.saved]:
        faults += _checkpoint(recorded, again.engine, step, now if step == end else None)
    notes = [*again.notes, *recorded.unknown(begin, end)] if faults else again.notes
    return Segment(begin, end, list(dict.fromkeys(faults)), notes)


def depth_of(recorded: Recorded, step: int) -> int:
    """The module depth at which a tape line records digests."""
    sessions = [s for s in recorded.tape.sessions if s["step"] < step]
    return int(sessions[-1]["modules"]) if sessions else 2


def _lines(recorded: Recorded, again: Again, begin: int, end: int) -> Iterator[str]:
    """The first tape line that differs."""
    for step in range(begin + 1, end + 1):
        was, now = recorded.tape.lines.get(step), again.lines.get(step)
        if was is None and recorded.tape.lines:
            yield f"step {step}: its line is not in the tape"
            return
        if was is not None and now is not None and (odd := differing(was, now)):
            shown = "; ".join(f"{part} {', '.join(names)}".strip() for part, names in odd.items())
            yield f"step {step}: the tape has different digests of: {shown}"
            return


def odd_metrics(recorded: Recorded, again: Again, begin: int, end: int) -> Iterator[OddMetric]:
    """The logged metrics that re-execution does not reproduce, in order of steps."""
    logged = _logged(recorded.folder / "metrics.jsonl", begin, end)
    if logged is None or _logs_by_the_clock(recorded):
        return
    heard: dict[int, dict[str, float]] = defaultdict(dict)
    for step, metrics in again.metrics:
        if begin < step <= end:
            heard[step] |= metrics
    for step in sorted({*heard, *logged}):
        mine, theirs = heard.get(step), logged.get(step)
        if mine is None or theirs is None:
            yield OddMetric(step, "", "is missing" if theirs is None else "is not from the run")
            continue
        for name, value in mine.items():
            finite = value if math.isfinite(value) else None
            if not _is_clock(name) and (name not in theirs or theirs[name] != finite):
                said = f"says {theirs[name]}" if name in theirs else "says nothing"
                said = f"{said}, and is {value:.9g}"
                yield OddMetric(step, name, said, (theirs.get(name), value))


def _logs_by_the_clock(recorded: Recorded) -> bool:
    """Whether it logs by time, so that re-execution logs other steps."""
    settings = settings_in(config_of(recorded.folder))
    lengths = filter(None, (settings.get(key) for key in ("log_every", "eval_every")))
    return any(Interval.parse(length).unit == "seconds" for length in lengths)


def _logged(path: Path, begin: int, end: int) -> dict[int, dict[str, Any]] | None:
    """The metrics of each step in a part of a run; None if the file does not exist."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in text.splitlines():
        try:
            record = json.loads(line)
            step = record.pop("step")
        except (ValueError, LookupError, AttributeError):
            continue
        if isinstance(step, int) and begin < step <= end and "note" not in record:
            found[step] |= record
    return found


def _is_clock(name: str) -> bool:
    return name in _OF_CLOCKS or name.startswith("system/")


def _checkpoint(
    recorded: Recorded, engine: Engine, step: int, now: Snapshot | None
) -> Iterator[str]:
    """How a checkpoint differs from the run, in words; `now` is the re-executed state, if any."""
    path = recorded.saved[step]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about added and missing observers
            snapshot = engine.hook.load_snapshot(engine=engine, source=str(path))
    except NexusError as error:
        yield f"{path.name}: {error}"
        return
    line = recorded.tape.lines.get(step, {})
    odd = [name for name, now in _weights(snapshot, depth_of(recorded, step)).items()
           if name in line.get("weights", {}) and line["weights"][name] != now]  # fmt: skip
    if odd:
        yield f"{path.name}: the weights of {', '.join(odd)} differ from the tape"
    if now is not None:
        watching = {n: bool(getattr(p, "only_watches", False)) for n, p in engine.plugins.items()}
        then = without_watchers(snapshot, watching)
        for part in _unlike(then, without_watchers(now, watching)):
            yield f"{path.name}: {part} differs when re-executed"


def _weights(snapshot: Snapshot, depth: int) -> dict[str, str]:
    """The digests of a checkpoint's weights, as on a tape."""
    groups = parts.by_module(snapshot["model"], depth)
    values: list[list[Tensor]] = list(groups.values())
    device = values[0][0].device
    digests = Digester()(values, device).tolist()
    return dict(zip(groups, map(hexadecimal, digests), strict=True))


def _unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The parts of two snapshots that differ, with the differing names in them."""
    for part in _STATE:
        one, other = then.get(part), now.get(part)
        if parts.of_tree(one) == parts.of_tree(other):
            continue
        names = [
            str(name)
            for name in (one if isinstance(one, Mapping) and isinstance(other, Mapping) else {})
            if parts.of_tree(one[name]) != parts.of_tree(other.get(name))  # type: ignore[index,union-attr]
        ]
        yield f"{part} ({', '.join(names[:5])})" if names else part
    counters = [{k: v for k, v in s["train"].items() if k != "seconds"} for s in (then, now)]
    if counters[0] != counters[1]:
        yield "a counter"
