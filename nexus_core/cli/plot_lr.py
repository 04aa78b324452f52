"""`nexus-run --plot-lr`: plot each parameter group's learning rate without training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from operator import length_hint
from pathlib import Path

from nexus_core.batches import Batch, batch_size
from nexus_core.cli.build import Build, make_engine
from nexus_core.cli.chart import NO_PICTURE, Chart, Line, save_picture, text_chart
from nexus_core.defaults import Defaults
from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_core.intervals import Exact, Interval, Length, TrainState
from nexus_core.relay import relay

__all__ = ["LrPlan", "plan_lr", "plot_lr"]

POINTS = 600  # more than a terminal or PNG can resolve


@dataclass(frozen=True)
class LrPlan:
    """The planned learning rates of a run.

    Args:
        total: number of steps of the run.
        steps: the steps planned here, from 0 to `total - 1`.
        rates: learning rates at these steps, by parameter group name.
        assumed: the step size assumed, in words; empty if it does not matter.
    """

    total: int
    steps: tuple[int, ...]
    rates: Mapping[str, tuple[float, ...]]
    assumed: str = ""


def plot_lr(made: Build) -> str:
    """Plot a run's learning rates: builds model, optimizer and schedules, trains nothing.

    Returns:
        The chart and the path of its PNG: `lr.png` in the run folder if one is set, else
        `runs/NAME-lr.png`.

    Raises:
        ConfigError: the horizon or a schedule counts seconds.
    """
    out = made.run.out or Path("runs") / made.name
    run = made.run.model_copy(update={"device": "cpu"})
    plan = plan_lr(make_engine(dataclasses.replace(made, run=run), out), run.until)
    merged = groupby(sorted(plan.rates, key=lambda name: plan.rates[name]), plan.rates.__getitem__)
    numbers = [step + 1 for step in plan.steps]
    lines = [Line(", ".join(names), numbers, rates) for rates, names in merged]
    top = max(max(line.y) for line in lines)
    chart = Chart(lines, "step", "learning rate", (0.0, 1.05 * top or 1.0))
    path = out / "lr.png" if made.run.out else Path("runs") / f"{made.name}-lr.png"
    picture = save_picture(chart, path)
    return "\n".join(
        [
            f"the learning rate over {plan.total:,} steps ({run.until})",
            text_chart(chart),
            *map(_in_words, lines),
            *([plan.assumed] if plan.assumed else []),
            f"PNG: {picture or NO_PICTURE}",
        ]
    )


def plan_lr(engine: Engine, until: Length, points: int = POINTS) -> LrPlan:
    """Ask the schedules for the learning rates of a run that has not started.

    Every plugin that implements `lr_scale` gets its `on_start`, and is then asked at steps spread
    evenly over the run. If an interval counts tokens or samples, one batch is read and all steps
    are assumed to be as large as the first; `LrPlan.assumed` says so.

    Args:
        engine: built from plugins only and never run; not usable afterwards.
        until: the horizon.
        points: maximum number of steps to ask at.

    Raises:
        ConfigError: the horizon or a schedule counts seconds, or the length of an epoch is
            unknown.
    """
    assert engine.data is not None
    data = engine.data.train
    state = _PlannedState(
        epoch_length=length_hint(data),
        data=data,
        accumulate=engine.accumulate,
        ends=engine.step_at_epoch_end,
    )
    planned = copy(engine)  # shares optimizer and plugins, has its own counters
    planned.state, planned.horizon = state, Interval.horizon(until)
    schedules = relay(planned.plan, Defaults(), lambda plugin: hasattr(plugin, "lr_scale"))
    schedules.on_start(engine=planned)
    state.accumulate = planned.accumulate
    state.asked.clear()
    total = state.steps_until(planned.horizon)
    count = min(points, total)
    steps = tuple(round(i * (total - 1) / max(count - 1, 1)) for i in range(count))
    groups = engine.optimizer.param_groups
    rates: list[list[float]] = []
    for step in steps:
        state.go_to(step)
        factor = math.prod(schedules.lr_scale(engine=planned))
        rates.append([group["initial_lr"] * factor for group in groups])
    names = [str(group.get("name", f"group {number}")) for number, group in enumerate(groups)]
    by_name = dict(zip(names, zip(*rates, strict=True), strict=True))
    return LrPlan(total, steps, by_name, state.assumed())


@dataclass
class _PlannedState(TrainState):
    """The counters of a simulated run, computed from the step and one batch."""

    data: Iterable[Batch] = ()
    accumulate: int = 1
    ends: bool = False  # the last step of an epoch is short
    asked: set[str] = field(default_factory=set)  # units that the plan depends on

    def counted(self, unit: str) -> float:
        self.asked.add(unit)
        if unit == "epochs":
            return self.epochs
        return float(self.step * self.a_step(unit)) if self.step else 0.0

    def exactly(self, unit: str) -> Exact:
        if unit == "epochs":
            self.asked.add(unit)
            return super().exactly(unit)
        return Fraction(self.counted(unit))

    def go_to(self, step: int) -> None:
        """Move to just before the given step."""
        self.step = step
        read = step * self.accumulate
        if self.ends and self.epoch_length:
            a_epoch = math.ceil(self.epoch_length / self.accumulate)
            read = step // a_epoch * self.epoch_length + step % a_epoch * self.accumulate
        self.epoch, self.batch = divmod(read, self.epoch_length) if self.epoch_length else (0, read)

    def steps_until(self, horizon: Interval) -> int:
        """The steps of a run with this horizon, at least one."""
        if horizon.unit == "epochs" and not self.epoch_length:
            raise ConfigError(
                f"the horizon is {horizon}, and this data does not say how long an epoch is; "
                "use steps, for instance --set until='1000 steps'"
            )
        self.asked.add(horizon.unit)
        return max(1, math.ceil(round(horizon.exact / self.a_step(horizon.unit), 6)))

    def a_step(self, unit: str) -> Fraction:
        """How much of a unit a step covers, taking every step to be like the first."""
        if unit == "seconds":
            raise ConfigError(
                "the plan counts seconds, and how many steps fit into them is known only while "
                "training; use another unit, for instance --set until='1000 steps'"
            )
        if unit == "steps":
            return Fraction(1)
        if unit == "epochs":
            steps = Fraction(self.epoch_length, self.accumulate)
            steps = Fraction(math.ceil(steps)) if self.ends else steps
            return 1 / steps if steps else Fraction(0)
        return Fraction(self.accumulate * self._a_batch[unit])

    def assumed(self) -> str:
        """The step size that the plan assumes, in words; empty if it does not matter."""
        decisive = sorted(self.asked & {"epochs", "samples", "tokens"})
        sizes = [f"{float(self.a_step(unit)):.6g} {unit}" for unit in decisive]
        return f"assuming every step covers {' and '.join(sizes)}, like the first" if sizes else ""

    @cached_property
    def _a_batch(self) -> dict[str, int]:
        rows, tokens = batch_size(next(iter(self.data)))
        return {"samples": rows, "tokens": tokens}


def _in_words(line: Line) -> str:
    top = max(line.y)
    place = line.y.index(top)
    return (
        f"{line.label}: first {line.y[0]:.3g}, highest {top:.3g} at step "
        f"{line.x[place]:,.0f}, last {line.y[-1]:.3g}"
    )
