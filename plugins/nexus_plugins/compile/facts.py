"""Host state that a graph of a step would freeze."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pickle import PickleBuffer
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nexus_core.plugin import Plugin
from nexus_plugins._shared.fused import FLAGS
from nexus_plugins.compile.parts import PLAIN, attributes, fact, is_dense, written

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["Facts", "Knowledge", "Owned", "Place", "Settings", "changed", "takes_part"]

Place: TypeAlias = tuple[str, int, str]
"""An owner in words, its number among its like, and its attribute."""
Owned: TypeAlias = tuple[Plugin[Any], str]
"""An attribute of a plugin."""

HOOKS = ("forward", "loss_terms", "backward")
"""What the gradient of a step is made of."""
OF_MODULES = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
HOOKS_OF_MODULES = frozenset(n for n in OF_MODULES if n.startswith(("_forward", "_backward")))
OF_HOST = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
UNCHANGING = (type, ModuleType, RemovableHandle)
TENSORS = ("params", "lr")
"""The settings of an optimizer that are on the device."""


class Facts:
    """Host values by location, to compare them from step to step.

    Args:
        device: of the run.

    Attributes:
        known: the values by location.
        generators: those of the device.
        host_generators: those of the host, whose state is not among the values: it only matters to
            a step that draws from them.
        refusal: what cannot be compared, in words; empty if everything can.
    """

    def __init__(self, device: torch.device) -> None:
        self.known: dict[Place, object] = {}
        self.generators: list[torch.Generator] = []
        self.host_generators: list[Any] = []
        self.refusal = ""
        self._device = device
        self._tensors: list[Tensor] = []
        self._modules: list[nn.Module] = []
        self._kept: list[object] = []  # so that no other object gets the identity of these
        self._seen: set[int] = set()

    def _look(self, place: Place, value: Any) -> None:
        """Record what a value is, or what is in it."""
        if type(value) in PLAIN:
            self.known[place] = fact(value)
            return
        if type(value) is tuple and all(type(part) in PLAIN for part in value):
            self.known[place] = tuple(map(fact, value))
            return
        try:
            self.known[place] = written(value, self._reference)
        except Exception as error:  # what the object's own code raises
            words = f"{_in_words(place)} cannot be compared from step to step: {error}"
            self.refusal = self.refusal or words

    def _reference(self, value: Any) -> object:
        """What stands for an object: the contents of a tensor or module are looked at elsewhere."""
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, nn.Module):
            self._modules.append(value)
        elif isinstance(value, torch.Generator):
            is_own = value.device.type == self._device.type
            (self.generators if is_own else self.host_generators).append(value)
        elif isinstance(value, OF_HOST) and not isinstance(value, random.SystemRandom):
            self.host_generators.append(value)
        elif not (isinstance(value, UNCHANGING) or id(value) in self._seen or _is_torch(value)):
            return None
        self._kept.append(value)
        return id(value)

    def _of_tensor(self, tensor: Tensor) -> object:
        """What tells a tensor from another one: on the host, that is what it holds."""
        if not is_dense(tensor):
            raise TypeError(f"a tensor of layout {tensor.layout} is not plain")
        facts = (tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        if not tensor.is_cpu:
            self._tensors.append(tensor)
            return *facts, tensor.stride(), tensor.data_ptr()
        numbers: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        return *facts, PickleBuffer(numbers)


class Knowledge(Facts):
    """The host state that the gradient of a step may depend on, by location.

    It covers the numbers, strings, settings and objects of the participating plugins and of the
    modules that they and the model have, and the identity of tensors. Tensor contents live on the
    device and do not count; tensors that are plugin attributes may be replaced between steps.

    Args:
        engine: of the run.
        everyone: include the plain values of the other plugins too, but not the objects they hold,
            which their own threads may be changing.

    Attributes:
        held: the device tensors that are plugin attributes.
    """

    def __init__(self, engine: Engine, everyone: bool = False) -> None:
        super().__init__(engine.device)
        self.held: dict[Owned, Tensor] = {}
        self._modules.append(engine.model)
        taking_part = list(takes_part(engine))
        run = (engine, engine.hook, engine.meter, engine.optimizer, engine.data, *taking_part)
        self._seen |= {id(each) for each in run}
        for plugin in engine.plugins.values():
            if plugin in taking_part:
                self._look_at_plugin(plugin)
            elif everyone:
                own = attributes(plugin).items()
                plain = {name: fact(value) for name, value in own if type(value) in PLAIN}
                self.known |= {_of(plugin, name): value for name, value in plain.items()}
        for root in self._modules:  # some are found on the way
            self._look_at_modules(root)

    @property
    def key(self) -> tuple[object, ...]:
        """Everything, as a comparable key."""
        return (*self.known, *self.known.values())

    def obstacle(self, engine: Engine) -> str:
        """Why the tensors of such a step are not for a graph, in words; empty if they are."""
        own = [tensor for root in self._modules for tensor in (*root.parameters(), *root.buffers())]
        fixed = list({id(tensor): tensor for tensor in (*own, *self._tensors)}.values())
        trained = {id(each) for each in (*engine.model.parameters(), *engine.parameters())}
        if any(t.requires_grad and id(t) not in trained for t in (*fixed, *self.held.values())):
            return "a plugin holds tensors that get a gradient"
        everything = (*fixed, *self.held.values())
        users = Counter(tensor.untyped_storage().data_ptr() for tensor in everything)
        for place, tensor in self.held.items():
            if tensor.numel() and users[tensor.untyped_storage().data_ptr()] > 1:
                return f"{_in_words(_of(*place))} shares its memory with another tensor"
        return ""

    def _look_at_plugin(self, plugin: Plugin[Any]) -> None:
        for name, value in attributes(plugin).items():
            if self._may_be_replaced(value):
                self.held[plugin, name] = value
                self.known[_of(plugin, name)] = value.shape, value.dtype, value.requires_grad
            else:
                self._look(_of(plugin, name), value)

    def _may_be_replaced(self, value: object) -> bool:
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return False
        return value.device == self._device and is_dense(value)

    def _look_at_modules(self, root: nn.Module) -> None:
        for module in root.modules():
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            owner, number = f"a module {type(module).__name__}", len(self._seen)
            for name, value in attributes(module).items():
                if name not in OF_MODULES or (value and name in HOOKS_OF_MODULES):
                    self._look((owner, number, name), value)
                elif value and name in ("_parameters", "_buffers"):
                    self._kept.extend(value.values())
                    self.known[owner, number, name] = tuple(map(self._of_module, value.values()))

    def _of_module(self, tensor: Tensor | None) -> object:
        """What tells a parameter or buffer from another one."""
        if tensor is None or is_lazy(tensor):
            return None
        return tensor.data_ptr(), tensor.requires_grad


class Settings(Facts):
    """The host values that the update of an optimizer may depend on, by location.

    Args:
        optimizer: the optimizer.
        device: of the run.
        everything: include its learning rates and state, and the plain values of its attributes.
    """

    def __init__(
        self, optimizer: Optimizer, device: torch.device, everything: bool = False
    ) -> None:
        super().__init__(device)
        owner, own = type(optimizer).__name__, attributes(optimizer)
        for name in FLAGS:
            self._look((owner, 0, name), own.get(name))
        for number, group in enumerate(optimizer.param_groups):
            but = TENSORS[:1] if everything else TENSORS
            settings = {n: value for n, value in group.items() if n not in but}
            self._look_at(f"a parameter group of {owner}", number, settings)
        if everything:
            plain = {name: value for name, value in own.items() if type(value) in PLAIN}
            self._look_at(owner, 0, plain)
            for number, state in enumerate(optimizer.state.values()):
                self._look_at(f"the state of {owner}", number, state)

    def _look_at(self, owner: str, number: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._look((owner, number, name), value)


def takes_part(engine: Engine) -> Iterator[Plugin[Any]]:
    """The plugins that implement a hook of the gradient computation."""
    for plugin in engine.plugins.values():
        if any(hasattr(getattr(plugin, hook, None), "nexus_impl") for hook in HOOKS):
            yield plugin


def changed(
    before: Mapping[Place, object], after: Mapping[Place, object], but: Collection[Owned] = ()
) -> str:
    """The first change outside some attributes of plugins, in words; empty if nothing changed."""
    left_out = {_of(*owned) for owned in but}
    for place in {**before, **after}:
        if before.get(place) != after.get(place) and place not in left_out:
            return _in_words(place)
    return ""


def _of(plugin: Plugin[Any], name: str) -> Place:
    return f"the plugin '{plugin.name}'", 0, name


def _in_words(place: Place) -> str:
    return f"'{place[2]}' of {place[0]}"


def _is_torch(value: object) -> bool:
    """Whether it is a function of PyTorch, which has no state that a run changes."""
    own = isinstance(value, FunctionType) and str(value.__globals__.get("__name__"))
    return bool(own) and f"{own}.".startswith("torch.")
