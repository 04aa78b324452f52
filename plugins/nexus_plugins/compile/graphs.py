"""Whether the gradient of a step can be replayed from a graph, and from which."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nexus_core import ConfigError
from nexus_plugins.compile.facts import Knowledge, Place, changed
from nexus_plugins.compile.inputs import Inputs, signature
from nexus_plugins.compile.replay import Added, Graph, computed, publish, undone
from nexus_plugins.compile.watch import watching

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["StepGraphs"]

WARM_UP = 3  # steps of a kind before it is captured; the last of them is watched
MOST = 8  # graphs kept
KINDS = 32  # distinct kinds of steps
UNLIKE = 5  # consecutive steps, each of a new kind


@dataclass
class _Kind:
    """Steps of one kind: how many there were, and their graph."""

    steps: int = 0
    graph: Graph | None = None


class StepGraphs:
    """Replays the gradient of a step from a captured graph if that is safe.

    Steps are of the same kind if their batches have the same shapes and the host state is the same.
    The first steps of each kind run eagerly, from static device memory, and the last of these is
    watched for host side effects, which a graph would not repeat.

    Args:
        engine: of the run, with its model on the device.

    Attributes:
        refusal: why no step is replayed; empty if steps are, or may be.
        replayed: replayed steps so far.

    Raises:
        ConfigError: graphs are not supported in this run.
    """

    def __init__(self, engine: Engine) -> None:
        _check(engine)
        self.refusal, self.replayed = "", 0
        self._module: Any = torch.get_device_module(engine.device)
        self._stream = self._module.Stream()
        self._kinds: defaultdict[Hashable, _Kind] = defaultdict(_Kind)
        self._unlike = 0
        self._last: tuple[Hashable, Mapping[Place, object]] = ((), {})

    def accumulate(self, engine: Engine, step: Step) -> None:
        """Compute the gradient for a step's turn, and record its losses and metrics."""
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
            kind.graph = kind.graph or self._captured(engine, step, knows, inputs)
            self.replayed += 1
            kind.graph.replay(engine, step)
            return
        is_watched = kind.steps == WARM_UP and not self.refusal
        with self._beside():
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
        said = f"compile.step_graph: steps run eagerly instead of from a graph: {reason}"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        engine.hook.on_note(engine=engine, title="compile/step_graph", text=said)

    def _watched(self, engine: Engine, step: Step, inputs: Inputs) -> Added:
        with watching(engine, step, self._module) as found:
            added = computed(engine, step, inputs)
        stateful = [name for name, value, _, _ in added if hasattr(value, "compute")]
        found += [f"the metric '{name}' keeps state" for name in stateful]
        if found:
            self._refuse(engine, found[0])
        return added

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Queue work on the stream that graphs are captured on."""
        self._stream.wait_stream(self._module.current_stream())
        try:
            with self._module.stream(self._stream):
                yield
        finally:
            self._module.current_stream().wait_stream(self._stream)

    def _captured(self, engine: Engine, step: Step, knows: Knowledge, inputs: Inputs) -> Graph:
        graphs = (kind.graph for kind in self._kinds.values() if kind.graph is not None)
        pool = next((graph.work.pool() for graph in graphs), None)
        work = self._module.CUDAGraph()
        for generator in knows.generators:
            work.register_generator_state(generator)
        graph = Graph(work, knows, inputs)
        with undone(engine, step):
            try:
                with self._module.graph(
                    work, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    graph.capture(engine, step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ConfigError(
                    "compile.step_graph: the step cannot be captured in a graph: "
                    f"{_first(error)}; leave out compile.step_graph"
                ) from error
            graph.note(engine)
        return graph


def _run(
    engine: Engine, step: Step, inputs: Inputs, compute: Callable[[Engine, Step, Inputs], Added]
) -> None:
    """Compute a gradient one operation at a time, from static inputs."""
    inputs.load(step)
    publish(engine, inputs, compute(engine, step, inputs))


def _first(error: BaseException) -> str:
    """What went wrong first: a capture that fails cannot be ended without a further error."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


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
