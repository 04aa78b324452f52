"""What the checks look with: plugins that fail or listen, and looks at classes and batches."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nexus_core import Batch, Engine, Plugin, PluginConfig, hookimpl
from nexus_core.plan import HOOK_NAMES

__all__ = [
    "FailingPlugin",
    "GradientProbePlugin",
    "PlannedError",
    "answered",
    "example_config",
    "gradients",
    "gradients_of_a_step",
    "joined",
    "make",
    "models_of",
    "shared_containers",
    "unmarked_methods",
]

OURS = ("nexus_core.",)


class PlannedError(Exception):
    """The failure that a check plans."""


class FailingPlugin(Plugin[PluginConfig]):
    """Fails on purpose.

    Args:
        at: in this step; 0 before the first, as the run starts.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    @property
    def moment(self) -> str:
        """When it fails, in words."""
        return f"step {self.at}" if self.at else "on_start"

    @hookimpl
    def on_start(self) -> None:
        """Fail where it is to fail at once."""
        if self.at == 0:
            raise PlannedError

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Fail in the step in which it is to fail."""
        if engine.state.step == self.at:
            raise PlannedError


class GradientProbePlugin(Plugin[PluginConfig]):
    """Copies the gradients as the update leaves them."""

    seen: dict[str, Tensor | None]

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool, bool]:
        """Look when everything about the update is done."""
        done = yield
        self.seen = gradients(engine.model)
        return done


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of each parameter's gradient, by the parameter's name."""
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def gradients_of_a_step(engine: Engine, data: Sequence[Batch], until: str) -> dict[str, Tensor]:
    """The gradients of one step over the batches, without dropout."""
    engine.model.eval()
    for _ in engine.steps(data, until=until):
        break
    found = gradients(engine.model)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch with the rows of all, which are of one make."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple):
        return tuple(joined(parts) for parts in zip(*batches, strict=True))
    return [row for batch in batches for row in batch] if isinstance(first, list) else first


def example_config(plugin_class: type[Plugin[Any]]) -> dict[str, Any]:
    """The first example in the JSON schema of a plugin's config, else no settings."""
    examples = plugin_class.config_class.model_json_schema().get("examples", [{}])
    return dict(examples[0])


def make(plugin_class: type[Plugin[Any]]) -> Plugin[Any]:
    """The plugin with its example settings."""
    return plugin_class(**example_config(plugin_class))


def answered(plugin: Plugin[Any]) -> set[str]:
    """The hooks that a plugin answers, those aside that it only wraps."""
    marks = {name: getattr(getattr(plugin, name, None), "nexus_impl", None) for name in HOOK_NAMES}
    return {name for name, mark in marks.items() if mark and not mark["wrapper"]}


def models_of(config_class: type[BaseModel]) -> set[type[BaseModel]]:
    """A config class and those of the blocks within it."""
    found = {config_class}
    for field in config_class.model_fields.values():
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= models_of(part)
    return found


def unmarked_methods(plugin_class: type[Plugin[Any]]) -> list[str]:
    """Public methods of a plugin that are no hooks and not of the core's classes."""
    return [
        name
        for base in _own_classes(plugin_class)
        for name, value in vars(base).items()
        if callable(value) and name[0] != "_" and not hasattr(value, "nexus_impl")
    ]


def shared_containers(plugin_class: type[Plugin[Any]]) -> dict[str, str]:
    """What lists, dicts and sets hold that belong to a plugin's classes or their modules."""
    found = {}
    for base in _own_classes(plugin_class):
        module = vars(sys.modules.get(base.__module__, object))
        for owner, names in ((base.__qualname__, vars(base)), (base.__module__, module)):
            for name, value in names.items():
                if isinstance(value, list | dict | set) and not name.startswith("__"):
                    found[f"{owner}.{name}"] = repr(value)
    return found


def _own_classes(plugin_class: type[Plugin[Any]]) -> Iterator[type]:
    for base in plugin_class.__mro__:
        if issubclass(base, Plugin) and not base.__module__.startswith(OURS):
            yield base


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)
