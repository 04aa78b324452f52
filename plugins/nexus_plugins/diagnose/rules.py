"""The rules: which numbers indicate a problem, and how to fix it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from nexus_plugins.diagnose.history import SURE, Baseline, History, Probe, Reading, Worth

__all__ = ["RULES", "Finding", "Rule", "examine"]

LOST = 0.5
"""Explosion: losing half of the progress, or rising to 1.5 times the first loss, is not noise."""
TWICE = 2
"""Explosion: consecutive readings, since the lowest of many levels may be low by chance."""
ROW = 3
"""Consecutive readings required: a single one may be chance."""
WINDOW = 12
"""Readings from which a trend is estimated: two halves of six."""
FLAT = 0.01
"""Slow convergence: a decrease below this share of the loss between halves is a plateau."""
HIDDEN = 0.05
"""Slow convergence: if noise could hide a decrease of this share, nothing is reported."""
UNLEARNED = 0.5
"""Slow convergence: a run that still has half of its first loss has not converged."""
JUST_PAST = 20
"""Slow convergence: readings considered after the peak learning rate, at least the warm-up."""
FULL = 0.9
"""Memory: fragmentation and short peaks can make allocations fail in the last tenth."""
DOMINANT = 10.0
"""Collapse: next to a gradient ten times larger, a term turns the sum by at most 6 degrees."""
FALLEN = 0.05
"""Collapse: a term whose loss fell by this share is being learned."""
DEAD_WIDTH = 0.05
"""Collapse: with a twentieth of its former deviation, an output hardly distinguishes rows."""
DEAD_PROBES = 2
"""Collapse: consecutive probes required; few, as the deviation over a batch varies little."""
DEAD_READINGS = 5
"""Dead layers: a unit may be inactive for a batch, but not a whole matrix in five readings."""
SAME_LR = 1e-3
"""Floor: relative difference up to which learning rates count as equal."""
FLOOR = 0.1
"""Floor: schedules end at a tenth of the peak or lower."""
FLOOR_READINGS = 8
"""Floor: readings at the same learning rate, so that the tail of a cosine does not count as one."""
STARVED = 0.3
"""Starvation: waiting this share of the time makes a run 1.4 times slower than necessary."""
STARVED_MS = 2.0
"""Starvation: transferring a batch from a worker takes about this long, so less is normal."""
WORTHLESS = 1e-3
"""Worth: ablating the module raises the loss by less than a thousandth."""
GROWING = 2.0
"""Worth: a module whose worth has doubled over the measurements is still being learned."""
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """A detected problem: the rule, the step, and the message for the user."""

    rule: str
    step: int
    text: str


@dataclass(frozen=True)
class Rule:
    """A kind of problem: its name, how the history shows it, and how to fix it.

    Args:
        name: as in the metric `diagnose/<name>`.
        judge: the evidence, in words; None if the problem is absent.
        remedy: what to change.
    """

    name: str
    judge: Callable[[History], str | None]
    remedy: str

    @property
    def title(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")


def examine(history: History, known: Sequence[str] = ()) -> list[Finding]:
    """Apply every rule to a history with at least one reading, except those already reported."""
    step = history.readings[-1].step
    judged = [(rule, rule.judge(history)) for rule in RULES if rule.name not in known]
    return [
        Finding(rule.name, step, f"{rule.title}: {shown}. {rule.remedy}")
        for rule, shown in judged
        if shown is not None
    ]


def loss_explosion(history: History) -> str | None:
    """A non-finite loss, persistent non-finite gradients, or a loss far above its level."""
    now, baseline = history.readings[-1], history.baseline
    if now.bad_step is not None:
        return f"the loss of step {now.bad_step} is not finite (learning rate {now.lr:.3g})"
    row, last = history.readings[-ROW:], history.readings[-TWICE:]
    if len(row) == ROW and not any(reading.gradient_finite for reading in row):
        return f"the gradient was not finite in each of the last {ROW} checks"
    if len(last) < TWICE:
        return None
    margin = LOST * max(abs(baseline.first), baseline.first - baseline.lowest)
    # The first step's loss is a single sample, so nearly every loss must be above its bound.
    from_start = baseline.start + LOST * abs(baseline.start) < min(r.floor for r in last)
    from_level = baseline.ceiling + margin < min(r.loss - SURE * r.error for r in last)
    if not from_start and not from_level:
        return None
    return (
        f"the loss is {now.loss:.4g} over the last {now.steps} steps, after {baseline.start:.4g} "
        f"in the first step and {min(baseline.start, baseline.lowest):.4g} at its lowest (learning "
        f"rate {now.lr:.3g})"
    )


def slow_convergence(history: History) -> str | None:
    """A plateau near the start, during warmup or just after it."""
    window, baseline = history.readings[-WINDOW:], history.baseline
    now, trend = window[-1], _trend(window)
    late = now.step - baseline.peak_step > max(baseline.peak_step, JUST_PAST * now.steps)
    if len(window) < WINDOW or late or trend is None:
        return None
    first, second, error = trend
    fall, size = first - second, abs(baseline.first)
    far_from_start = abs(second - baseline.first) > UNLEARNED * size
    if far_from_start or fall >= FLAT * abs(first) or fall + 2 * error >= HIDDEN * abs(first):
        return None
    rising = now.step == baseline.peak_step
    where = "is still rising" if rising else f"was at its highest in step {baseline.peak_step}"
    return (
        f"the loss went from {first:.4g} to {second:.4g} in {_steps(window)} steps, from "
        f"{baseline.first:.4g} at the start, while the learning rate {where} ({now.lr:.3g})"
    )


def memory_near_limit(history: History) -> str | None:
    """More than 90% of memory in use."""
    memory = history.readings[-1].memory
    if memory is None or memory.used < FULL * memory.limit:
        return None
    share, gib = memory.used / memory.limit, 2**30
    return (
        f"{memory.used / gib:.2f} of {memory.limit / gib:.2f} GiB {memory.where} are in use "
        f"({share:.0%})"
    )


def module_collapse(history: History) -> str | None:
    """A term that drowns out another in the trunk, or modules with constant output."""
    return _dominance(history.probes[-ROW:], history.baseline) or _dead_outputs(
        history.probes[-DEAD_PROBES:], history.baseline
    )


def dead_layers(history: History) -> str | None:
    """Matrices without a gradient in five readings in a row."""
    last = history.readings[-DEAD_READINGS:]
    if len(last) < DEAD_READINGS:
        return None
    silent = [name for name in last[-1].silent if all(name in r.silent for r in last)]
    if not silent:
        return None
    return (
        f"{_listed(silent)} had no gradient (less than 1e-7 of the largest) in each of the last "
        f"{DEAD_READINGS} checks, since step {last[0].step}"
    )


def lr_at_floor(history: History) -> str | None:
    """A learning rate stuck at its floor while the loss is still falling."""
    window = history.readings[-FLOOR_READINGS:]
    rates, peak = [reading.lr for reading in window], history.baseline.peak_lr
    low = max(rates) <= FLOOR * peak * (1 + SAME_LR)
    resting = max(rates) - min(rates) <= SAME_LR * max(rates)
    trend = _trend(window)
    if len(window) < FLOOR_READINGS or not low or not resting or trend is None or not peak:
        return None
    first, second, error = trend
    if first - second < max(SURE * error, FLAT * abs(first)):
        return None
    return (
        f"the learning rate has been at {rates[-1]:.3g} for {_steps(window)} steps, "
        f"{rates[-1] / peak:.0%} of its highest, and the loss still fell from {first:.4g} "
        f"to {second:.4g}"
    )


def data_starvation(history: History) -> str | None:
    """A training loop that waits for batches."""
    waits = [reading.wait for reading in history.readings[-ROW:] if reading.wait is not None]
    if len(waits) < ROW:
        return None
    if min(w.share for w in waits) < STARVED or min(w.milliseconds for w in waits) < STARVED_MS:
        return None
    return (
        f"the loop spends {waits[-1].share:.0%} of its time waiting for the next batch, "
        f"{waits[-1].milliseconds:.1f} ms per step, in each of the last {ROW} checks"
    )


def worthless_module(history: History) -> str | None:
    """Modules whose ablation does not raise the evaluation loss, three times in a row."""
    last = history.worths[-ROW:]
    if len(last) < ROW:
        return None
    idle = [name for name in last[-1].worths if _is_idle(name, last)]
    if not idle:
        return None
    told = ", ".join(f"{name} {last[-1].worths[name]:+.2g}" for name in idle)
    return (
        f"ablating a module hardly changes the loss of {last[-1].loss:.4g} in each of the last "
        f"{ROW} measurements: {told}"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "loss_explosion",
        loss_explosion,
        "Lower the learning rate, clip the gradient (clip), or lengthen the warmup; guard skips "
        "steps that are not finite.",
    ),
    Rule(
        "slow_convergence",
        slow_convergence,
        "Check that inputs and labels match. If they do: past its peak, use a longer warmup "
        "to a lower learning rate; early in the warmup, use a shorter one.",
    ),
    Rule(
        "memory_near_limit",
        memory_near_limit,
        "Use smaller micro-batches and accumulate more of them, or add recompute.",
    ),
    Rule(
        "module_collapse",
        module_collapse,
        "Change the weights of the loss terms, or let weigh_magnitude, weigh_gradnorm or "
        "weigh_uncertainty choose them.",
    ),
    Rule(
        "dead_layers",
        dead_layers,
        "Lower the learning rate, use an activation with a gradient everywhere (GELU, SiLU), "
        "initialize smaller biases, or check that a loss reaches them.",
    ),
    Rule(
        "lr_at_floor",
        lr_at_floor,
        "Decay the learning rate later (a longer horizon), or raise its floor (min_lr).",
    ),
    Rule(
        "data_starvation",
        data_starvation,
        "Use more worker processes (num_workers of the data or loader), or do the "
        "expensive preprocessing once and store it.",
    ),
    Rule(
        "worthless_module",
        worthless_module,
        "Disable it and its loss, and compare (nexus-run compare): it costs time, and may only "
        "help through its loss.",
    ),
)
"""Every rule, in the order in which they are judged and documented."""


def _trend(window: Sequence[Reading]) -> tuple[float, float, float] | None:
    """Mean loss of the first and of the second half, and the standard error of the difference.

    None if there are fewer than two readings, or a loss was not finite.
    """
    if len(window) < 2 or any(reading.bad_step is not None for reading in window):
        return None
    middle = len(window) // 2
    first, second = window[:middle], window[middle:]
    variance = fmean([reading.deviation**2 for reading in window])
    error = math.sqrt(variance * (1 / _steps(first) + 1 / _steps(second)))
    return fmean([r.loss for r in first]), fmean([r.loss for r in second]), error


def _steps(readings: Sequence[Reading]) -> int:
    return sum(reading.steps for reading in readings)


def _dominance(probes: Sequence[Probe], baseline: Baseline) -> str | None:
    """A term whose gradient is ten times that of a term that should matter and be decreasing."""
    if len(probes) < ROW:
        return None
    names = [name for name in probes[-1].terms if all(name in probe.terms for probe in probes)]
    for strong in names:
        for weak in names:
            ratio = _typical_ratio(probes, strong, weak)
            if (
                strong != weak
                and ratio >= DOMINANT
                and _is_harmed(probes[-1], strong, weak, baseline)
            ):
                one, other = probes[-1].terms[strong], probes[-1].terms[weak]
                return (
                    f"the gradient of the term {strong} (weight {one.weight:g}, loss "
                    f"{one.loss:.4g}) is {ratio:.0f} times as large on the shared parameters as "
                    f"that of {weak} (weight {other.weight:g}, loss {other.loss:.4g}), in the last "
                    f"{len(probes)} probes"
                )
    return None


def _typical_ratio(probes: Sequence[Probe], strong: str, weak: str) -> float:
    """The geometric mean of the ratio of two gradient norms; 0 if one is missing."""
    pairs = [(probe.terms[strong].norm, probe.terms[weak].norm) for probe in probes]
    if any(not math.isfinite(a) or not math.isfinite(b) or min(a, b) <= 0 for a, b in pairs):
        return 0.0
    return math.exp(fmean([math.log(a / b) for a, b in pairs]))


def _is_harmed(probe: Probe, strong: str, weak: str, baseline: Baseline) -> bool:
    """Whether the weaker term was not weighted down on purpose, and is large or not decreasing."""
    one, other = probe.terms[strong], probe.terms[weak]
    meant_to_count = other.weight >= min(1.0, one.weight)
    first = baseline.first_losses[weak]
    falls = other.loss < first - FALLEN * abs(first)
    return meant_to_count and (other.loss >= one.loss or not falls)


def _dead_outputs(probes: Sequence[Probe], baseline: Baseline) -> str | None:
    """Modules whose output has stayed below a twentieth of its widest deviation."""
    if len(probes) < DEAD_PROBES:
        return None
    dead = [
        name
        for name in probes[-1].outputs
        if all(
            probe.outputs.get(name, math.inf) < DEAD_WIDTH * baseline.widest[name]
            for probe in probes
        )
    ]
    if not dead:
        return None
    now, before = probes[-1].outputs[dead[0]], baseline.widest[dead[0]]
    return (
        f"{_listed(dead)} output nearly the same for every row of the batch: the deviation of "
        f"{dead[0]} fell from {before:.3g} to {now:.3g}"
    )


def _is_idle(name: str, measured: Sequence[Worth]) -> bool:
    """Whether a module was worth less than a thousandth each time, and is not improving."""
    worths = [one.worths.get(name, math.inf) for one in measured]
    small = all(w < WORTHLESS * abs(one.loss) for w, one in zip(worths, measured, strict=True))
    return small and not 0 < GROWING * worths[0] < worths[-1]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
