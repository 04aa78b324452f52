"""Checks the run periodically with rules, and reports findings."""

from __future__ import annotations

import math
import re
import warnings
from collections import ChainMap
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus_core import Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.signatures import Several
from nexus_plugins._shared.term_gradients import Gradient, add_term_gradients, trunk_products
from nexus_plugins.diagnose.history import (
    History,
    Memory,
    Probe,
    Reading,
    TermProbe,
    Worth,
    reading_of,
)
from nexus_plugins.diagnose.rules import Finding, examine
from nexus_plugins.diagnose.sensors import (
    WaitClock,
    gradient_sizes,
    memory_gauge,
    silent,
    to_host,
    watch_outputs,
)

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["DiagnoseConfig", "DiagnosePlugin"]

RuleName = Literal[
    "loss_explosion",
    "slow_convergence",
    "memory_near_limit",
    "module_collapse",
    "dead_layers",
    "lr_at_floor",
    "data_starvation",
    "worthless_module",
]

_WORTH = re.compile(r"module/(.+)_worth")


class DiagnoseConfig(PluginConfig):
    """Settings of the diagnosis."""

    every: int = Field(default=10, ge=1, description="steps between checks")
    probe_every: int | None = Field(
        default=50,
        ge=1,
        description="steps between probes of module outputs and of gradients by term, which cost "
        "one backward pass per term; null: never, and no module_collapse",
    )
    ignore: Several[RuleName] = Field(default=(), description="rules to disable")


class DiagnosePlugin(Plugin[DiagnoseConfig]):
    """Watches loss, gradients, outputs, memory and the loader; does not affect training.

    Each finding is reported once: as a warning when it occurs, in the run summary, and to every
    logger as `diagnose/<rule>`: as a text note if the logger supports it, and as the step at which
    it was found, next to the number of `diagnose/findings`. The rules are in
    `nexus_plugins.diagnose.rules`. The device syncs only at readings. Findings and readings are
    saved; times and memory, which belong to a session, are not.
    """

    config_class = DiagnoseConfig
    topology_invariant: ClassVar[bool] = False
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._history = History()
        self._found: list[Finding] = []
        self._pending: list[dict[str, Tensor]] = []  # the terms of each step since the last reading
        self._outputs: dict[str, Tensor] = {}  # of the probe since the last reading
        self._norms: dict[str, Tensor] = {}
        self._gradients: dict[str, Gradient] = {}
        self._sizes: dict[str, Tensor] = {}
        self._clock: WaitClock | None = None
        self._memory: Callable[[], Memory | None] = lambda: None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings so far, in order."""
        return tuple(self._found)

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Start watching."""
        self._gradients, self._sizes = {}, {}
        self._clock = WaitClock(engine.device)
        self._memory = memory_gauge(engine.device)

    @hookimpl
    def on_batch(self) -> None:
        """Record that a batch has arrived."""
        if self._clock is not None:
            self._clock.batch_came()

    @hookimpl(wrapper=True)
    def forward(self, engine: Engine, step: Step | None) -> Generator[None, Any, Any]:
        """In a probe, measure the modules' outputs for the last micro-batch."""
        if step is None or not (step.is_last and self._probes(step)):
            return (yield)
        with watch_outputs(engine.model, self._outputs):
            return (yield)

    @hookimpl(wrapper=True)
    def backward(
        self, engine: Engine, terms: Mapping[str, Tensor], step: Step
    ) -> Generator[None, bool, bool]:
        """In a probe, compute each term's gradient before the combined backward pass."""
        if self._probes(step) and len(terms) > 1:
            before = self._gradients if step.place else {}
            parameters = list(_trained(engine.model).values())
            self._gradients = add_term_gradients(before, terms, parameters)
            if step.is_last:
                names, products = trunk_products(self._gradients)
                self._norms = dict(zip(names, products.diagonal().sqrt().unbind(), strict=True))
                self._gradients = {}
        return (yield)

    @hookimpl(stage="inspect")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """If a reading is due after this step, measure its gradient."""
        if step.number % self.config.every == 0:
            self._sizes = gradient_sizes(_trained(engine.model))

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        """Keep the step's losses on the device, and take a reading if due."""
        if self._clock is not None:
            self._clock.step_trained()
        self._pending.append(dict(step.losses))
        if engine.state.step % self.config.every == 0:
            self._read(engine)

    @hookimpl
    def on_eval(self, metrics: dict[str, float]) -> None:
        """Record the worth of each module, if it was measured."""
        worths = {found[1]: v for n, v in metrics.items() if (found := _WORTH.fullmatch(n))}
        if worths:
            loss = next(value for name, value in metrics.items() if name.endswith("/loss"))
            self._history = self._history.with_worth(Worth(loss, worths))

    @hookimpl(stage="clock")
    def on_step_end(self) -> None:
        """Record that the loop now waits for a batch."""
        if self._clock is not None:
            self._clock.step_ended()

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The number of findings, and the step of each."""
        steps = {f"diagnose/{finding.rule}": float(finding.step) for finding in self._found}
        return {"diagnose/findings": float(len(self._found)), **steps}

    @hookimpl
    def summarize(self) -> dict[str, str]:
        """List the findings, or say that there are none."""
        lines = [f"step {finding.step:,}: {finding.text}" for finding in self._found]
        return {"diagnose": "\n".join(lines) or "nothing found"}

    def state_dict(self) -> StateDict:
        """The readings and findings, and losses not yet read."""
        state: dict[str, Any] = {
            "history": self._history.state_dict(),
            "found": [asdict(finding) for finding in self._found],
            "pending": [dict(step) for step in self._pending],
            "outputs": dict(self._outputs),
            "norms": dict(self._norms),
        }
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the readings and findings."""
        saved = cast(dict[str, Any], state)
        self._history = History.from_state(saved["history"])
        self._found = [Finding(**finding) for finding in saved["found"]]
        self._pending = [dict(step) for step in saved["pending"]]
        self._outputs, self._norms = dict(saved["outputs"]), dict(saved["norms"])

    def _probes(self, step: Step) -> bool:
        period = self.config.probe_every
        return bool(period and (step.number - 1) % period == 0 and not step.again)

    def _read(self, engine: Engine) -> None:
        """Transfer everything to the host, apply the rules, and report new findings."""
        steps, self._pending = self._pending, []
        losses = _losses(engine, steps)
        weights = ChainMap(*map(dict, engine.hook.loss_weight(engine=engine)))
        totals = [sum(weights.get(n, 1.0) * v for n, v in step.items()) for step in losses]
        reading = self._reading(engine, totals)
        first = next((total for total in totals if math.isfinite(total)), math.nan)
        self._history = self._history.with_reading(reading, first)
        outputs, norms = to_host(self._outputs), to_host(self._norms)
        if outputs or norms:
            means = {name: fmean([step[name] for step in losses]) for name in losses[0]}
            terms = {n: TermProbe(weights.get(n, 1.0), means[n], v) for n, v in norms.items()}
            self._history = self._history.with_probe(Probe(reading.step, terms, outputs))
            self._outputs, self._norms = {}, {}
        known = [*self.config.ignore, *(finding.rule for finding in self._found)]
        for finding in examine(self._history, known):
            self._found.append(finding)
            if engine.ranks.is_main:
                warnings.warn(f"step {finding.step}: {finding.text}", RuntimeWarning, stacklevel=2)
                title = f"diagnose/{finding.rule}"
                engine.hook.on_note(engine=engine, title=title, text=finding.text)

    def _reading(self, engine: Engine, totals: list[float]) -> Reading:
        sizes, self._sizes = to_host(self._sizes), {}
        matrices = [name for name, p in _trained(engine.model).items() if p.ndim > 1]
        finite = all(map(math.isfinite, sizes.values()))
        lr = float(engine.optimizer.param_groups[0]["lr"])
        return replace(
            reading_of(totals, engine.state.step, lr),
            gradient_finite=finite,
            silent=silent(sizes, matrices) if finite else (),
            memory=self._memory(),
            wait=self._clock.read() if self._clock is not None else None,
        )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The currently trained parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _losses(engine: Engine, steps: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """The unweighted mean of each term in each step over all ranks; 0 if it was absent."""
    names = sorted({name for step in steps for name in step})
    absent = torch.zeros((), device=engine.device)
    rows = [[step.get(name, absent).to(absent) for name in names] for step in steps]
    table = engine.ranks.sum(torch.stack([torch.stack(row) for row in rows])).tolist()
    return [dict(zip(names, row, strict=True)) for row in table]
