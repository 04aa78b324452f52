"""Dissect a step: its inputs and everything computed in it, in order, phase by phase."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nexus_core.cli.digests import Digester, hexadecimal
from nexus_core.processes import local_part
from nexus_plugins.tape import parts
from nexus_plugins.tape.again import Watch

if TYPE_CHECKING:
    from nexus_core import Step
    from nexus_core.engine import Engine
    from nexus_core.plan import Plan

__all__ = ["OUTSIDE", "Moment", "Probe"]

KEPT = 1 << 30  # bytes of tensors kept per step, to compute differences
MODEL = "(the model)"
OUTSIDE = "(outside of the modules)"
_ACTING = ("on_batch", "loss_terms", "after_backward", "on_step")
"""Hooks after which changes are recorded."""


@dataclass(frozen=True)
class Moment:
    """A value that was present or computed in a step.

    Args:
        phase: phase of the step: start, batch, generators, forward, loss, backward, gradient,
            settings, update or end.
        module: the module, plugin, term or generator it belongs to.
        name: name of the value within it.
        digest: digest of its type, shape and bits.
        about: its type and shape, in words.
        value: a copy on the host, if there is one.
    """

    phase: str
    module: str
    name: str
    digest: str
    about: str = ""
    value: Tensor | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the same moment in two runs."""
        return self.phase, self.module, self.name

    def bare(self) -> Moment:
        """The same moment without its copy."""
        return replace(self, value=None)


class Probe(Watch):
    """Records all moments of one step.

    Args:
        step: its number.
        operations: whether to record each tensor operation of the forward and backward pass too;
            compiled code then runs eagerly.
    """

    def __init__(self, step: int, *, operations: bool = False) -> None:
        self.moments: list[Moment] = []
        self._step, self._operations, self._active = step, operations, False
        self._bytes = 0
        self._within: list[str] = []  # modules being computed, or plugins
        self._phase = "forward"
        self._engine: Engine | None = None
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._digester = Digester()

    def built(self, engine: Engine) -> None:
        """The engine of the plugins."""
        self._engine = engine

    def watch(self, plan: Plan) -> None:
        """Observe what each plugin has done."""
        for plugin in plan.plugins:
            for hook in _ACTING if not getattr(plugin, "only_watches", False) else ():
                method = getattr(plugin, hook, None)
                if method is not None:
                    setattr(plugin, hook, self._after(method, plugin.name, hook))

    def attach(self, engine: Engine) -> None:
        """Observe what each module computes."""
        for name, module in engine.model.named_modules():
            module.register_forward_pre_hook(self._entering(name or MODEL))
            module.register_forward_hook(self._leaving(name or MODEL))

    def before(self, engine: Engine, step: int) -> None:
        """Start recording when the step starts."""
        self._active = step == self._step
        if self._active:
            self._state("start", engine)

    def batch(self, who: str, batch: object) -> None:
        """Record a batch as loaded, or as left by a plugin."""
        for path, leaf in parts.leaves_of(batch):
            self._note("batch", path or "batch", who, leaf)

    def generators(self) -> None:
        """Record the generators right before the forward pass."""
        if self._active:
            for name, digest in parts.generators().items():
                self._note("generators", name, "state", digest)

    def losses(self, step: Step) -> None:
        """Record the units, weights and means of the terms."""
        for name in step.losses:
            self._note("loss", name, "units", step.units.get(name))
            self._note("loss", name, "mean", step.losses[name])
            self._note("loss", name, "weight", step.weights.get(name, 1.0))

    def gradient(self, engine: Engine, phase: str, who: str) -> None:
        """Record each gradient in backward order, last layer first."""
        for name, parameter in reversed(list(engine.model.named_parameters())):
            if self._active and parameter.grad is not None:
                module, _, own = name.rpartition(".")
                self._note(phase, module or MODEL, f"gradient of {own}{who}", parameter.grad)

    def settings(self, engine: Engine) -> None:
        """Record the settings of the optimizer's groups."""
        for place, group in enumerate(engine.optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    self._note("settings", f"group {place}", key, value)

    def updated(self, engine: Engine, phase: str) -> None:
        """Record weights and optimizer after the update, or at the end of the step."""
        self._state(phase, engine)
        self._active = self._active and phase != "end"

    @property
    def notes_operations(self) -> bool:
        """Whether operations are currently recorded."""
        return self._active and self._operations

    def operation(self, name: str, output: object) -> None:
        """Record a tensor operation within the current module."""
        for path, leaf in parts.leaves_of(output):
            if isinstance(leaf, Tensor):
                where = self._within[-1] if self._within else OUTSIDE
                self._note(self._phase, where, f"{name}{path and ' '}{path}", leaf)

    def _state(self, phase: str, engine: Engine) -> None:
        if not self._active:
            return
        for name, value in engine.model.state_dict().items():
            module, _, own = name.rpartition(".")
            self._note(phase, module or MODEL, own, value)
        names = {id(p): name for name, p in engine.model.named_parameters()}
        for parameter, state in engine.optimizer.state.items():
            module, _, own = names.get(id(parameter), "").rpartition(".")
            for key, value in state.items():
                self._note(phase, module or MODEL, f"{key} of {own} in the optimizer", value)
        for name, plugin in engine.plugins.items():
            if not getattr(plugin, "only_watches", False) and (kept := plugin.state_dict()):
                self._note(phase, name, "state of the plugin", kept)

    def _after(self, method: Callable[..., Any], plugin: str, hook: str) -> Callable[..., Any]:
        """Wrap a hook's method to record what it changed."""
        if getattr(method, "nexus_impl", {}).get("wrapper"):
            return method

        @wraps(method)
        def call(*arguments: object) -> Any:
            if hook == "loss_terms":
                return self._loss(plugin, method, arguments)
            answer = method(*arguments)
            if hook == "on_batch":
                self.batch(f"after {plugin}", answer)
            elif self._engine is not None and hook == "after_backward":
                self.gradient(self._engine, "gradient", f", after {plugin}")
            elif self._engine is not None:
                self._weights_after(plugin, self._engine)
            return answer

        return call

    def _loss(self, plugin: str, method: Callable[..., Any], arguments: Sequence[object]) -> Any:
        self._phase, self._within = "loss", [*self._within, plugin]
        try:
            return method(*arguments)
        finally:
            self._phase, self._within = "forward", self._within[:-1]

    def _weights_after(self, plugin: str, engine: Engine) -> None:
        for name, value in engine.model.state_dict().items() if self._active else ():
            module, _, own = name.rpartition(".")
            self._note("update", module or MODEL, f"{own}, after {plugin}", value)

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._within.append(path)

        return enter

    def _leaving(self, path: str) -> Callable[..., None]:
        def leave(_: nn.Module, __: object, output: object) -> None:
            if self._within and self._within[-1] == path:
                self._within.pop()
            for name, leaf in parts.leaves_of(output):
                if isinstance(leaf, Tensor):
                    self._note("forward", path, f"output{name and ' '}{name}", leaf)

        return leave

    @torch.no_grad()
    def _note(self, phase: str, module: str, name: str, value: object) -> None:
        if not self._active:
            return
        self._seen[phase, module, name] += 1
        if (count := self._seen[phase, module, name]) > 1:
            name = f"{name} ({count})"
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            digest = parts.of_tree(value)
            self.moments.append(Moment(phase, module, name, digest, f"{value!s:.60}"))
            return
        tensor = local_part(value.detach())
        size = tensor.numel() * tensor.element_size()
        kept = tensor.to("cpu", copy=True) if self._bytes + size <= KEPT else None
        self._bytes += size if kept is not None else 0
        about = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        digest = hexadecimal(int(self._digester([[tensor]], tensor.device)[0]))
        digest = hashlib.sha256(f"{about}{digest}".encode()).hexdigest()[:16]
        self.moments.append(Moment(phase, module, name, digest, about, kept))
