"""Capture the gradient of a step in a graph, and replay it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nexus_core import ConfigError
from nexus_core.optimizers import clear_gradients
from nexus_core.update import accumulate_gradient
from nexus_plugins.compile.facts import Knowledge, changed, watching
from nexus_plugins.compile.inputs import Inputs, signature

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["StepGraphs"]

Added: TypeAlias = list[tuple[str, Any, Any, Any]]
"""What was added to the meter."""

WARM_UP = 3  # steps of a kind before it is captured; the last of them is watched
MOST = 8  # graphs that are kept
UNLIKE = 5  # steps in a row of which each is of a new kind


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
        self._inputs: dict[Hashable, Inputs] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._steps: Counter[Hashable] = Counter()
        self._unlike = 0
        self._last: tuple[Hashable, Knowledge] | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def accumulate(self, engine: Engine, step: Step) -> None:
        """Compute the gradient for a step's turn, and record its losses and metrics."""
        kind = signature(step)
        if kind not in self._inputs:
            self._inputs[kind] = Inputs(step, engine.device)
        inputs = self._inputs[kind]
        inputs.load(step)
        if self.refusal or step.again:
            _publish(engine, inputs, _computed(engine, step, inputs))
            return
        knows = Knowledge(engine)
        key = (kind, knows.key)
        self._steps[key] += 1
        self._judge(engine, kind, key, knows, inputs)
        if self._steps[key] > WARM_UP and not self.refusal and key not in self._graphs:
            self._graphs[key] = self._captured(engine, step, inputs, knows)
        if graph := self._graphs.get(key):
            self.replayed += 1
            graph.replay(engine, step, inputs)
            return
        with self._beside():
            is_last = self._steps[key] == WARM_UP and not self.refusal
            compute = self._watched if is_last else _computed
            _publish(engine, inputs, compute(engine, step, inputs))

    def _judge(
        self, engine: Engine, kind: Hashable, key: Hashable, knows: Knowledge, inputs: Inputs
    ) -> None:
        """Give up where steps are never alike, or cannot be replayed."""
        before, self._last = self._last, (kind, knows)
        self._unlike = self._unlike + 1 if self._steps[key] == 1 else 0
        if inputs.refusal:
            self._refuse(engine, inputs.refusal)
        elif self._steps[key] > WARM_UP and len(self._graphs) >= MOST and key not in self._graphs:
            self._refuse(engine, f"there are graphs of {MOST} kinds of steps, and more kinds come")
        elif self._unlike >= UNLIKE and before is not None:
            what = "the shape of the batches" if kind != before[0] else changed(before[1], knows)
            self._refuse(engine, f"{what} changes from step to step")

    def _refuse(self, engine: Engine, reason: str) -> None:
        self.refusal = reason
        said = (
            f"compile.step_graph: steps are not replayed from a graph, but run one operation at a "
            f"time, as {reason}"
        )
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        engine.hook.on_note(engine=engine, title="compile/step_graph", text=said)

    def _watched(self, engine: Engine, step: Step, inputs: Inputs) -> Added:
        with watching(engine, step, self._module) as found:
            added = _computed(engine, step, inputs)
        if found:
            self._refuse(engine, found[0])
        return added

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Queue work on the stream that graphs are captured on."""
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            yield
        self._module.current_stream().wait_stream(self._stream)

    def _captured(self, engine: Engine, step: Step, inputs: Inputs, knows: Knowledge) -> _Graph:
        pool = next((graph.work.pool() for graph in self._graphs.values()), None)
        work = self._module.CUDAGraph()
        for generator in knows.generators:
            work.register_generator_state(generator)
        graph = _Graph(work, knows)
        try:
            with self._module.graph(
                work, pool=pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                graph.capture(engine, step, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                "compile.step_graph: the step cannot be captured in a graph: "
                f"{_first(error)}; leave out compile.step_graph"
            ) from error
        graph.note(engine, Knowledge(engine))
        return graph


class _Graph:
    """The gradient of steps of one kind.

    Args:
        work: the work to capture.
        knows: the host state before such a step.
    """

    def __init__(self, work: Any, knows: Knowledge) -> None:
        self.work = work
        self._taken = knows.held
        self._given: dict[Any, Tensor] = {}
        self._added: Added = []
        self._losses: dict[str, Tensor] = {}
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._counted: list[Tensor] = []

    def capture(self, engine: Engine, step: Step, inputs: Inputs) -> None:
        """Run the work to capture."""
        self._added = _computed(engine, step, inputs)
        self._losses = {n: step.losses[n] for n in step.units if n in step.losses}
        numbers = [*self._losses.values(), *(value for _, value, _, _ in self._added)]
        self._shown = _Numbers([n for n in numbers if isinstance(n, Tensor)])

    def note(self, engine: Engine, knows: Knowledge) -> None:
        """Record where the captured work left its outputs."""
        everything = {*engine.model.parameters(), *engine.parameters()}
        self._gradients = [(p, p.grad) for p in everything if p.grad is not None]
        self._given = {
            place: tensor.detach()
            for place, tensor in knows.held.items()
            if self._taken.get(place) is not tensor
        }
        for (plugin, name), taken in self._taken.items():
            setattr(plugin, name, taken)  # capturing has computed nothing
        buffers = engine.model.buffers()
        self._counted = [buffer for buffer in buffers if not buffer.is_floating_point()]

    def replay(self, engine: Engine, step: Step, inputs: Inputs) -> None:
        """Replay the graph for a step whose inputs are in place."""
        for (plugin, name), taken in self._taken.items():
            if (now := getattr(plugin, name)) is not taken:
                taken.detach().copy_(now)
        clear_gradients(engine.optimizer, engine.untrained())
        self.work.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for (plugin, name), tensor in self._given.items():
            setattr(plugin, name, tensor.clone())
        increment_version(self._counted)
        step.passes += 1
        step.place = len(step.micro) - 1
        shown = self._shown.copies()
        step.losses |= {name: next(shown) for name in self._losses}
        added = [
            (name, next(shown) if isinstance(value, Tensor) else value, units, finish)
            for name, value, units, finish in self._added
        ]
        _publish(engine, inputs, added, is_static=True)


class _Numbers:
    """Scalar outputs of a graph, copied together before the next replay."""

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._numbers = [number.detach() for number in numbers]
        single = [n.reshape(()) for n in self._numbers if n.dtype == torch.float32]
        self._packed = torch.stack(single) if single else None

    def copies(self) -> Iterator[Tensor]:
        """A copy of each, in order."""
        packed = iter(() if self._packed is None else self._packed.clone().unbind())
        for number in self._numbers:
            is_packed = number.dtype == torch.float32
            yield next(packed).reshape(number.shape) if is_packed else number.clone()


def _computed(engine: Engine, step: Step, inputs: Inputs) -> Added:
    """Compute the gradient from the inputs; gives what it has added to the meter."""
    mark = engine.meter.mark()
    with inputs.given_to(step):
        accumulate_gradient(engine, step)
    return engine.meter.rollback(mark)


def _publish(engine: Engine, inputs: Inputs, added: Added, is_static: bool = False) -> None:
    """Add a step's values to the meter, replacing the graph's outputs by copies."""
    for name, value, units, finish in added:
        own = inputs.original(units)
        moves = is_static and own is units and isinstance(units, Tensor)
        engine.meter.add(name, value, units.clone() if moves else own, finish)


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
