"""The gradient of a step as a graph, which is captured once and replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from nexus_core.optimizers import clear_gradients
from nexus_core.update import accumulate_gradient
from nexus_plugins.compile.facts import Knowledge, Owned, Settings, takes_part
from nexus_plugins.compile.inputs import Inputs
from nexus_plugins.compile.recorder import Recorder

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["Added", "Graph", "UpdateGraph", "computed", "publish", "same"]

Added: TypeAlias = list[tuple[str, Any, Any, Any]]
"""What was added to the meter."""


class UpdateGraph(NamedTuple):
    """The captured update of an optimizer, with the settings and tensors that it has."""

    work: Any
    settings: Settings
    tensors: Sequence[object]
    weights: Sequence[Tensor]

    def fits(self, settings: Settings, tensors: Sequence[object]) -> bool:
        """Whether an update with these is the captured one."""
        return self.settings.known == settings.known and same(self.tensors, tensors)


class Graph:
    """The gradient of steps of one kind.

    Args:
        knows: the host state before such a step.
        inputs: of such a step.

    Attributes:
        inputs: the same.
        gradients: where it leaves the gradient of each parameter that gets one.
        updates: the updates with these gradients.
    """

    def __init__(self, knows: Knowledge, inputs: Inputs) -> None:
        self.inputs = inputs
        self.gradients: dict[Tensor, Tensor] = {}
        self.updates: dict[Optimizer, UpdateGraph] = {}
        self._work: Any = None
        self._knows = knows  # kept, as other objects may get the identity of those that go
        self._taken = {place: tensor.detach().clone() for place, tensor in knows.held.items()}
        self._written: list[Owned] = []
        self._given: dict[Owned, Tensor] = {}
        self._added: Added = []
        self._losses: dict[str, Tensor] = {}
        self._counted: list[Tensor] = []

    def capture(self, engine: Engine, step: Step, recorder: Recorder) -> None:
        """Capture such a step.

        Raises:
            ConfigError: it cannot be captured.
        """
        with _undone(engine, step):
            run = partial(self._run, engine, step)
            self._work = recorder.captured("the step", run, self._knows.generators)
            self._note(engine)

    def _run(self, engine: Engine, step: Step) -> None:
        for (plugin, name), taken in self._taken.items():
            setattr(plugin, name, taken)
        versions = {place: taken._version for place, taken in self._taken.items()}
        self._added = computed(engine, step, self.inputs)
        self._written = [p for p, taken in self._taken.items() if taken._version != versions[p]]
        self._losses = {n: step.losses[n] for n in step.units if n in step.losses}
        numbers = [*self._losses.values(), *(value for _, value, _, _ in self._added)]
        self._shown = _Numbers([n for n in numbers if isinstance(n, Tensor)])

    def _note(self, engine: Engine) -> None:
        """Record where the captured work left its outputs."""
        everything = {*engine.model.parameters(), *engine.parameters()}
        self.gradients = {p: p.grad for p in everything if p.grad is not None}
        self._given = {
            place: tensor.detach()
            for place, tensor in Knowledge(engine).held.items()
            if self._taken.get(place) is not tensor
        }
        buffers = engine.model.buffers()
        self._counted = [buffer for buffer in buffers if not buffer.is_floating_point()]

    def replay(self, engine: Engine, step: Step) -> None:
        """Replay the graph for a step whose inputs are in place."""
        for (plugin, name), taken in self._taken.items():
            taken.copy_(getattr(plugin, name))
        clear_gradients(engine.optimizer, engine.untrained())
        self._work.replay()
        for plugin, name in self._written:
            getattr(plugin, name).copy_(self._taken[plugin, name])
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        for (plugin, name), tensor in self._given.items():
            setattr(plugin, name, tensor.clone())
        increment_version(self._counted)  # which tells what a step that fails has to undo
        step.passes += 1
        step.place = len(step.micro) - 1
        shown = self._shown.copies()
        step.losses |= {name: next(shown) for name in self._losses}
        added = [
            (name, next(shown) if isinstance(value, Tensor) else value, units, finish)
            for name, value, units, finish in self._added
        ]
        publish(engine, self.inputs, added, is_static=True)


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


def computed(engine: Engine, step: Step, inputs: Inputs) -> Added:
    """Compute the gradient from the inputs; gives what it has added to the meter."""
    mark = engine.meter.mark()
    with inputs.given_to(step):
        accumulate_gradient(engine, step)
    return engine.meter.rollback(mark)


def publish(engine: Engine, inputs: Inputs, added: Added, is_static: bool = False) -> None:
    """Add a step's values to the meter, replacing the graph's outputs by copies."""
    for name, value, units, finish in added:
        own = inputs.original(units)
        moves = is_static and own is units and isinstance(units, Tensor)
        engine.meter.add(name, value, units.clone() if moves else own, finish)


def same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether two sequences have the same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


@contextmanager
def _undone(engine: Engine, step: Step) -> Iterator[None]:
    """Undo what a block leaves on the host: capturing computes nothing, so that it is garbage."""
    before = [(plugin, dict(vars(plugin))) for plugin in takes_part(engine)]
    mark, passes, losses = engine.meter.mark(), step.passes, dict(step.losses)
    try:
        yield
    finally:
        for plugin, own in before:
            for name in vars(plugin).keys() - own.keys():
                delattr(plugin, name)
            vars(plugin).update(own)
        engine.meter.rollback(mark)
        step.passes, step.losses = passes, losses
        clear_gradients(engine.optimizer, engine.untrained())
