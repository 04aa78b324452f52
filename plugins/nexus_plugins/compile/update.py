"""The update of an optimizer, with its learning rates on the device, and replayed if possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from nexus_core.optimizers import trained
from nexus_plugins.compile.facts import Place, Settings, changed
from nexus_plugins.compile.on_device import OnDevice, obstacle
from nexus_plugins.compile.recorder import UNLIKE, WARM_UP, Recorder, tell
from nexus_plugins.compile.replay import Graph, UpdateGraph, same
from nexus_plugins.compile.watch import watching_update

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["Update"]

Closure = Callable[[], float]
REPLACED = "a plugin replaces gradients between the backward pass and the update"
SAID = "This instance was constructed with capturable=True"


class Update:
    """Takes the steps of one optimizer, and replays them from graphs if that is safe.

    All steps read their learning rates from the device, so that replayed ones are bitwise equal to
    eager ones; between steps, the optimizer has its own settings. The first steps run eagerly, and
    the last of these is watched for host side effects. A graph reads the gradients that another
    graph computes, and belongs to it.

    Args:
        optimizer: the optimizer.
        device: of the run.
        recorder: captures the graphs.

    Attributes:
        refusal: why no update is replayed; empty if updates are, or may be.
        replayed: replayed updates so far.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, recorder: Recorder) -> None:
        self.refusal, self.replayed = "", 0
        self._optimizer, self._device, self._recorder = optimizer, device, recorder
        self._obstacle = obstacle(optimizer, device)
        self._on_device = OnDevice(optimizer, device)
        self._last: Mapping[Place, object] = {}
        self._alike = self._unlike = 0
        self._was_watched = self._ran = False

    @contextmanager
    def stepping(self, engine: Engine, gradient: Graph | None) -> Iterator[None]:
        """Be the optimizer's `step` in a block, whoever calls it.

        Args:
            engine: of the run.
            gradient: the graph that has computed the gradient; None: it was computed eagerly.
        """
        if self._obstacle:
            if gradient is not None and not self.refusal:
                self._refuse(engine, self._obstacle)
            yield
            return

        def step(optimizer: Optimizer, closure: Closure | None = None) -> object:
            vars(optimizer)["_opt_called"] = True  # PyTorch's schedulers look at it
            with self._on_device.in_use():
                graph = None if closure else self._graph(engine, gradient)
                if graph is None:
                    return self._eagerly(engine, closure)
                graph.work.replay()
                increment_version(graph.weights)
                self.replayed += 1
                return None

        own = vars(self._optimizer)
        before = {name: own[name] for name in ("step",) if name in own}
        own["step"] = MethodType(Optimizer.profile_hook_step(step), self._optimizer)
        try:
            yield
        finally:
            del own["step"]
            own.update(before)

    def _graph(self, engine: Engine, gradient: Graph | None) -> UpdateGraph | None:
        """The graph of this update; None: it is to run eagerly."""
        if self.refusal:
            return None
        settings = Settings(self._optimizer, self._device)
        if reason := settings.refusal or self._judged(settings.known):
            self._refuse(engine, reason)
        elif gradient is not None and self._was_watched:
            known = gradient.updates.get(self._optimizer)
            if known is not None and known.fits(settings, self._tensors()):
                return known
            if self._has_all_of(gradient, engine):
                return self._captured(gradient, settings)
        return None

    def _judged(self, known: Mapping[Place, object]) -> str:
        """Why to give up: the settings keep changing; empty if they do not."""
        last, self._last = self._last, known
        if known == last:
            self._alike, self._unlike = self._alike + 1, 0
            return ""
        self._alike, self._unlike, self._was_watched = 1, self._unlike + 1, False
        return f"{changed(last, known)} changes from step to step" if self._unlike >= UNLIKE else ""

    def _has_all_of(self, gradient: Graph, engine: Engine) -> bool:
        """Whether all gradients are those that a graph has computed; a skipped step has none."""
        pairs = [(p.grad, gradient.gradients.get(p)) for p in trained(self._optimizer)]
        if any(given is not None and given is not own for given, own in pairs):
            self._refuse(engine, REPLACED)
        return all(given is own for given, own in pairs)

    def _tensors(self) -> list[object]:
        """The learning rates, weights, gradients and state that an update uses."""
        found: list[object] = [group["lr"] for group in self._optimizer.param_groups]
        weights, state = trained(self._optimizer), self._optimizer.state
        found += weights
        found += [weight.grad for weight in weights]
        for weight in weights:
            found += state.get(weight, {}).values()
        return found

    def _captured(self, gradient: Graph, settings: Settings) -> UpdateGraph | None:
        """A graph of the update; None if it would create state in each replay."""
        self._on_device.move_state()
        state, tensors = self._optimizer.state, self._tensors()
        before = {parameter: dict(own) for parameter, own in state.items()}
        try:
            work = self._recorder.captured("the update", self._compute)
        finally:
            if not same(tensors, self._tensors()):
                state.clear()
                state.update(before)  # the rest was captured, and never computed
                self._alike, self._was_watched = 0, False
        if not self._was_watched:
            return None
        graph = gradient.updates[self._optimizer] = UpdateGraph(
            work, settings, tensors, trained(self._optimizer)
        )
        return graph

    def _eagerly(self, engine: Engine, closure: Closure | None) -> object:
        self._on_device.move_state()
        is_due = self._alike >= WARM_UP and not (self._was_watched or self.refusal)
        with self._recorder.beside():
            if is_due and any(p.grad is not None for p in trained(self._optimizer)):
                return self._watched(engine, closure)
            if self._ran:
                return self._compute(closure)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", SAID)
                self._ran = True
                return self._compute(closure)

    def _watched(self, engine: Engine, closure: Closure | None) -> object:
        self._was_watched = True
        with watching_update(self._optimizer, self._device, self._recorder.module) as found:
            loss = self._compute(closure)
        if found:
            self._refuse(engine, found[0])
        return loss

    def _compute(self, closure: Closure | None = None) -> object:
        """Update the weights without the hooks, which have been called."""
        step: Any = type(self._optimizer).step
        return step.__wrapped__(self._optimizer, closure)

    def _refuse(self, engine: Engine, reason: str) -> None:
        self.refusal = reason
        tell(engine, "updates", reason)
