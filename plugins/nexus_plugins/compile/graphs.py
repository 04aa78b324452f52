"""Whether a step can be replayed from graphs, and from which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from nexus_core import ConfigError
from nexus_core.optimizers import members
from nexus_plugins.compile.facts import Knowledge, Place, changed
from nexus_plugins.compile.inputs import Inputs, signature
from nexus_plugins.compile.recorder import UNLIKE, WARM_UP, Recorder, tell
from nexus_plugins.compile.replay import Added, Graph, computed, publish
from nexus_plugins.compile.update import Update
from nexus_plugins.compile.watch import watching

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["StepGraphs"]

MOST = 8  # graphs kept
KINDS = 32  # distinct kinds of steps


@dataclass
class _Kind:
    """Steps of one kind: how many there were, and their graph."""

    steps: int = 0
    graph: Graph | None = None


class StepGraphs:
    """Replays the gradient of a step, and the update, from captured graphs if that is safe.

    Steps are of the same kind if their batches have the same shapes and the host state is the same.
    The first steps of each kind run eagerly, from static device memory, and the last of these is
    watched for host side effects, which a graph would not repeat.

    Args:
        engine: of the run, with its model on the device.

    Attributes:
        refusal: why no step is replayed; empty if steps are, or may be.
        replayed: steps so far whose gradient was replayed.

    Raises:
        ConfigError: graphs are not supported in this run.
    """

    def __init__(self, engine: Engine) -> None:
        _check(engine)
        self.refusal, self.replayed = "", 0
        self._recorder = Recorder(engine.device)
        self._updates: dict[Optimizer, Update] = {}
        self._current: Graph | None = None
        self._kinds: defaultdict[Hashable, _Kind] = defaultdict(_Kind)
        self._unlike = 0
        self._last: tuple[Hashable, Mapping[Place, object]] = ((), {})

    @property
    def replayed_updates(self) -> int:
        """Replayed updates so far."""
        return sum(update.replayed for update in self._updates.values())

    @contextmanager
    def updating(self, engine: Engine, step: Step) -> Iterator[None]:
        """Let the optimizers of a step's turn replay their updates in a block."""
        with ExitStack() as held:
            for optimizer in members(engine.optimizer, step.turn).values():
                if optimizer not in self._updates:
                    self._updates[optimizer] = Update(optimizer, engine.device, self._recorder)
                update = self._updates[optimizer]
                update.refusal = update.refusal or self.refusal
                held.enter_context(update.stepping(engine, self._current))
            yield

    def accumulate(self, engine: Engine, step: Step) -> None:
        """Compute the gradient for a step's turn, and record its losses and metrics."""
        self._current = None
        if self.refusal or step.again:
            _run(engine, step, Inputs(step, engine.device), computed)
            return
        shape, knows = signature(step), Knowledge(engine)
        kind = self._kinds[shape, knows.key]
        kind.steps += 1
        inputs = kind.graph.inputs if kind.graph else Inputs(step, engine.device)
        if reason := inputs.refusal or knows.refusal or self._judged(engine, kind, shape, knows):
            self._refuse(engine, reason)
        elif kind.steps > WARM_UP:
            inputs.load(step)
            if kind.graph is None:
                graph = Graph(knows, inputs)
                graph.capture(engine, step, self._recorder)
                kind.graph = graph
            self.replayed += 1
            self._current = kind.graph
            kind.graph.replay(engine, step)
            return
        is_watched = kind.steps == WARM_UP and not self.refusal
        with self._recorder.beside():
            _run(engine, step, inputs, self._watched if is_watched else computed)

    def _judged(self, engine: Engine, kind: _Kind, shape: Hashable, knows: Knowledge) -> str:
        """Why to give up: steps keep changing, or cannot be captured; empty if neither."""
        (last_shape, last), self._last = self._last, (shape, knows.known)
        self._unlike = self._unlike + 1 if kind.steps == 1 else 0
        if self._unlike >= UNLIKE or len(self._kinds) > KINDS:
            what = "the shape of the batches" if shape != last_shape else changed(last, knows.known)
            return f"{what} changes from step to step"
        if kind.graph is not None or kind.steps <= WARM_UP:
            return ""
        if sum(each.graph is not None for each in self._kinds.values()) >= MOST:
            return f"there are graphs for {MOST} kinds of steps, and more kinds appear"
        return knows.obstacle(engine)

    def _refuse(self, engine: Engine, reason: str) -> None:
        self.refusal = reason
        self._kinds.clear()  # and with them all memory
        self._last = ((), {})
        tell(engine, "steps", reason)

    def _watched(self, engine: Engine, step: Step, inputs: Inputs) -> Added:
        with watching(engine, step, self._recorder.module) as found:
            added = computed(engine, step, inputs)
        stateful = [name for name, value, _, _ in added if hasattr(value, "compute")]
        found += [f"the metric '{name}' keeps state" for name in stateful]
        if found:
            self._refuse(engine, found[0])
        return added


def _run(
    engine: Engine, step: Step, inputs: Inputs, compute: Callable[[Engine, Step, Inputs], Added]
) -> None:
    """Compute a gradient one operation at a time, from static inputs."""
    inputs.load(step)
    publish(engine, inputs, compute(engine, step, inputs))


def _check(engine: Engine) -> None:
    """See that a run can have graphs at all.

    Raises:
        ConfigError: it cannot.
    """
    module, fault = torch.get_device_module(engine.device), ""
    if not hasattr(module, "CUDAGraph"):
        fault = f"{engine.device} has no graphs; run on cuda"
    elif engine.ranks.size > 1:
        fault = f"there are {engine.ranks.size} processes, which exchange gradients in a step"
    elif engine.cells:
        fault = "a run in cells seeds the generators within a step"
    if fault:
        raise ConfigError(f"compile.step_graph: {fault}; or leave out compile.step_graph")
