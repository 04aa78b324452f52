"""The readings of a run so far, which the rules judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any, cast

from nexus_core import StateDict

__all__ = [
    "SURE",
    "Baseline",
    "History",
    "Memory",
    "Probe",
    "Reading",
    "TermProbe",
    "Wait",
    "Worth",
    "reading_of",
]

READINGS_KEPT = 24
PROBES_KEPT = 3
WORTHS_KEPT = 3
SURE = 3.0
"""Standard deviations, or standard errors, that include nearly every value."""
SURE_IN_LOGARITHMS = 5.0
"""The same for logarithms, which have a long lower tail, as losses can come close to 0."""
RISE = 1.001  # a learning rate this much higher than the highest so far is a new peak


@dataclass(frozen=True)
class Memory:
    """Memory in use and in total, in bytes, and what kind of memory it is."""

    used: float
    limit: float
    where: str


@dataclass(frozen=True)
class Wait:
    """The share of time spent waiting for batches, and milliseconds per step."""

    share: float
    milliseconds: float


@dataclass(frozen=True)
class Reading:
    """Measurements of a period of training.

    Args:
        step: the last step of the period.
        steps: number of its steps.
        loss: mean of the finite losses of its steps; each is the sum of the terms' means, with
            their static weights.
        deviation: standard deviation of these losses.
        floor: a bound below nearly all losses: some standard deviations below the mean, of the
            losses or of their logarithms, whichever is higher.
        bad_step: the first step whose loss was not finite.
        lr: learning rate of the first parameter group in the last step.
        gradient_finite: whether the gradient of the last step was finite.
        silent: matrices without a gradient in the last step.
        memory: memory at the end of the period.
        wait: time spent waiting for batches.
    """

    step: int
    steps: int
    loss: float
    deviation: float
    floor: float
    bad_step: int | None
    lr: float
    gradient_finite: bool = True
    silent: tuple[str, ...] = ()
    memory: Memory | None = None
    wait: Wait | None = None

    @property
    def error(self) -> float:
        """Standard error of the mean loss."""
        return self.deviation / math.sqrt(self.steps)


@dataclass(frozen=True)
class TermProbe:
    """A loss term: its static weight, its unweighted mean, and the norm of its weighted gradient
    over the trunk."""

    weight: float
    loss: float
    norm: float


@dataclass(frozen=True)
class Probe:
    """Measurements of one step that are too costly for every reading.

    Args:
        step: the step.
        terms: the terms that reach the trunk, by name; empty with fewer than two.
        outputs: standard deviation of each module's output over the rows of the batch.
    """

    step: int
    terms: Mapping[str, TermProbe] = field(default_factory=dict)
    outputs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Worth:
    """The worth of each module in an evaluation.

    Args:
        loss: loss of the evaluation.
        worths: increase of the loss without the module, by name.
    """

    loss: float
    worths: Mapping[str, float]


@dataclass(frozen=True)
class Baseline:
    """What the run is compared with.

    Args:
        start: loss of the first finite step.
        first: mean loss of the first reading that has one.
        lowest: lowest mean loss of a reading.
        ceiling: lowest upper end of a mean loss: three standard errors above it.
        peak_lr: highest learning rate of a reading.
        peak_step: the step of that reading.
        first_losses: the unweighted mean of each term when it was first probed.
        widest: the largest deviation of each module's output.
    """

    start: float = math.inf
    first: float = math.inf
    lowest: float = math.inf
    ceiling: float = math.inf
    peak_lr: float = 0.0
    peak_step: int = 0
    first_losses: Mapping[str, float] = field(default_factory=dict)
    widest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """The last readings, probes and worths, oldest first, and the baseline."""

    readings: tuple[Reading, ...] = ()
    probes: tuple[Probe, ...] = ()
    worths: tuple[Worth, ...] = ()
    baseline: Baseline = Baseline()

    def with_reading(self, reading: Reading, first_loss: float) -> History:
        """Add a reading; `first_loss` is that of its first finite step, NaN if it has none."""
        before = self.baseline
        found, fresh = math.isfinite(first_loss), math.isinf(before.start)
        higher = reading.lr > RISE * before.peak_lr
        baseline = replace(
            before,
            start=first_loss if found and fresh else before.start,
            first=reading.loss if found and fresh else before.first,
            lowest=min(before.lowest, reading.loss) if found else before.lowest,
            ceiling=min(before.ceiling, reading.loss + SURE * reading.error)
            if found
            else before.ceiling,
            peak_lr=reading.lr if higher else before.peak_lr,
            peak_step=reading.step if higher else before.peak_step,
        )
        readings = (*self.readings, reading)[-READINGS_KEPT:]
        return replace(self, readings=readings, baseline=baseline)

    def with_probe(self, probe: Probe) -> History:
        """Add a probe."""
        before = self.baseline
        losses = {name: term.loss for name, term in probe.terms.items()}
        widest = {
            name: max(width, before.widest.get(name, 0.0)) for name, width in probe.outputs.items()
        }
        baseline = replace(
            before,
            first_losses={**losses, **before.first_losses},
            widest={**before.widest, **widest},
        )
        return replace(self, probes=(*self.probes, probe)[-PROBES_KEPT:], baseline=baseline)

    def with_worth(self, worth: Worth) -> History:
        """Add a measurement of the modules' worth."""
        return replace(self, worths=(*self.worths, worth)[-WORTHS_KEPT:])

    def state_dict(self) -> StateDict:
        """The history as JSON; memory and waiting belong to the session and are left out."""
        lasting = tuple(replace(reading, memory=None, wait=None) for reading in self.readings)
        state = asdict(replace(self, readings=lasting))
        state["readings"] = [{**r, "silent": list(r["silent"])} for r in state["readings"]]
        state["probes"], state["worths"] = list(state["probes"]), list(state["worths"])
        return cast(StateDict, state)

    @classmethod
    def from_state(cls, state: StateDict) -> History:
        """Restore what `state_dict` returned."""
        saved = cast(dict[str, Any], state)
        return cls(
            tuple(Reading(**{**r, "silent": tuple(r["silent"])}) for r in saved["readings"]),
            tuple(_probe(probe) for probe in saved["probes"]),
            tuple(Worth(**worth) for worth in saved.get("worths", [])),
            Baseline(**saved["baseline"]),
        )


def reading_of(losses: Sequence[float], step: int, lr: float) -> Reading:
    """Summarize the losses of the steps up to `step`; the mean is 0 if none is finite."""
    first = step - len(losses) + 1
    bad_step = next((first + i for i, v in enumerate(losses) if not math.isfinite(v)), None)
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    mean, deviation = fmean(finite), pstdev(finite)
    floor = mean - SURE * deviation
    if min(finite) > 0:
        logarithms = [math.log(loss) for loss in finite]
        floor = max(floor, math.exp(fmean(logarithms) - SURE_IN_LOGARITHMS * pstdev(logarithms)))
    return Reading(step, len(losses), mean, deviation, floor, bad_step, lr)


def _probe(saved: Mapping[str, Any]) -> Probe:
    terms = {name: TermProbe(**term) for name, term in saved["terms"].items()}
    return Probe(saved["step"], terms, saved["outputs"])
