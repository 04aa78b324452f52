"""Helpers of the checks: plugins that fail or record, and inspection of classes and batches."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, get_args
from unittest import SkipTest

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from nexus_core import Batch, Engine, Plugin, PluginConfig, hookimpl
from nexus_core.batches import batch_size
from nexus_core.plan import HOOK_NAMES
from nexus_core.snapshot import Snapshot

__all__ = [
    "FailingPlugin",
    "GradientProbePlugin",
    "PlannedError",
    "SnapshotProbePlugin",
    "StillPlugin",
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
    """A failure caused on purpose by a check."""


class FailingPlugin(Plugin[PluginConfig]):
    """Fails on purpose.

    Args:
        at: step to fail in; 0: at the start of the run.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    @property
    def moment(self) -> str:
        """When it fails, as text."""
        return f"step {self.at}" if self.at else "on_start"

    @hookimpl
    def on_start(self) -> None:
        """Fail if `at` is 0."""
        if self.at == 0:
            raise PlannedError

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Fail in step `at`."""
        if engine.state.step == self.at:
            raise PlannedError


class GradientProbePlugin(Plugin[PluginConfig]):
    """Copies the gradients as the update leaves them."""

    seen: dict[str, Tensor | None]

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool, bool]:
        """Copy after the update is complete."""
        done = yield
        self.seen = gradients(engine.model)
        return done


class SnapshotProbePlugin(Plugin[PluginConfig]):
    """Copies the complete saved snapshot, and the loaded one."""

    saved: Snapshot
    loaded: Snapshot

    @hookimpl(trylast=True)
    def on_save(self, snapshot: Snapshot) -> None:
        """Copy it after all other plugins have added to it."""
        self.saved = copy.deepcopy(snapshot)

    @hookimpl
    def on_load(self, snapshot: Snapshot) -> None:
        """Copy it before other plugins read it."""
        self.loaded = copy.deepcopy(snapshot)


class StillPlugin(Plugin[PluginConfig]):
    """Runs training steps in evaluation mode, without dropout."""

    @hookimpl
    def on_batch(self, engine: Engine) -> None:
        """Set the mode once the run has started."""
        engine.model.eval()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of each parameter's gradient, by the parameter's name."""
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def gradients_of_a_step(engine: Engine, data: Iterable[Batch], until: str) -> dict[str, Tensor]:
    """The gradients of one step over the batches; add `StillPlugin` to disable dropout."""
    for _ in engine.steps(data, until=until):
        break
    found = gradients(engine.model)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch with the rows of all batches, which must have the same structure.

    A list is either a structure (`[x, y]`) or a list of rows: a structure if each of its entries
    has as many rows as the batch.

    Raises:
        SkipTest: the kit cannot join such batches.
    """
    return _joined(batches, batch_size(batches[0])[0])


def _joined(parts: Sequence[Batch], rows: int) -> Batch:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.ndim else first
    if isinstance(first, np.ndarray):
        return np.concatenate(list(parts)) if first.ndim else first
    if isinstance(first, Mapping):
        values = {key: _joined([part[key] for part in parts], rows) for key in first}
        return _filled(first, values) if isinstance(first, MutableMapping) else values
    if isinstance(first, list) and not all(_has_rows(part, rows) for part in first):
        return [row for part in parts for row in part]
    if isinstance(first, list | tuple) and not isinstance(first, PackedSequence):
        columns = [_joined(column, rows) for column in zip(*parts, strict=True)]
        return columns if isinstance(first, list) else tuple.__new__(type(first), columns)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        return _joined_fields(first, parts, rows)
    if hasattr(first, "to") or hasattr(first, "__dict__"):
        raise SkipTest(f"the kit cannot join batches of {type(first).__qualname__}")
    return first


def _joined_fields(first: Any, parts: Sequence[Batch], rows: int) -> Batch:
    new = copy.copy(first)
    for name in (field.name for field in dataclasses.fields(first)):
        object.__setattr__(new, name, _joined([getattr(part, name) for part in parts], rows))
    return new


def _filled(batch: MutableMapping[Any, Any], values: Mapping[Any, Any]) -> Batch:
    new = copy.copy(batch)
    for key, value in values.items():
        new[key] = value
    return new


def _has_rows(part: Batch, rows: int) -> bool:
    single = part is None or isinstance(part, str | bytes | int | float)
    return not single and batch_size(part)[0] == rows


def example_config(plugin_class: type[Plugin[Any]]) -> dict[str, Any]:
    """The first example in the JSON schema of a plugin's config, or empty settings."""
    examples = plugin_class.config_class.model_json_schema().get("examples", [{}])
    return dict(examples[0])


def make(plugin_class: type[Plugin[Any]]) -> Plugin[Any]:
    """The plugin with its example settings."""
    return plugin_class(**example_config(plugin_class))


def answered(plugin: Plugin[Any]) -> set[str]:
    """The hooks that a plugin implements, not counting wrappers."""
    marks = {name: getattr(getattr(plugin, name, None), "nexus_impl", None) for name in HOOK_NAMES}
    return {name for name, mark in marks.items() if mark and not mark["wrapper"]}


def models_of(config_class: type[BaseModel]) -> set[type[BaseModel]]:
    """A config class and the classes of its nested blocks."""
    found = {config_class}
    for field in config_class.model_fields.values():
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= models_of(part)
    return found


def unmarked_methods(plugin_class: type[Plugin[Any]]) -> list[str]:
    """Public methods of a plugin that are neither hooks nor inherited from the core."""
    return [
        name
        for base in _own_classes(plugin_class)
        for name, value in vars(base).items()
        if callable(value) and name[0] != "_" and not hasattr(value, "nexus_impl")
    ]


def shared_containers(plugin_class: type[Plugin[Any]]) -> dict[str, str]:
    """The contents of lists, dicts and sets on a plugin's classes and in their modules."""
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
