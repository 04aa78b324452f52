"""A metric: built from settings, updated, and merged over ranks."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn

from nexus_core import ConfigError, PluginConfig, places
from nexus_core.errors import suggestion
from nexus_core.processes import Ranks, gather

__all__ = ["Metric", "MetricConfig", "make", "numbers", "part_at", "together"]

Place = str | int | None


class Metric(Protocol):
    """A metric as torchmetrics has them."""

    def update(self, *values: Any) -> object: ...
    def compute(self) -> Any: ...
    def reset(self) -> object: ...


class MetricConfig(PluginConfig):
    """One metric."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"]})
    metric: places.PlaceField = Field(
        description="class in torchmetrics (Accuracy, F1Score, AUROC), or its path: ./net.py:Worst"
    )
    args: dict[str, Any] = Field(
        default={}, description="its arguments: {task: multiclass, num_classes: 10}"
    )

    @model_validator(mode="before")
    @classmethod
    def _metric_alone(cls, given: object) -> object:
        return {"metric": given} if isinstance(given, str) else given


def make(name: str, config: MetricConfig, plugin: str) -> Metric:
    """The metric that settings describe.

    Raises:
        ConfigError: there is no such thing, or it does not take the arguments.
    """
    key, path = f"{plugin}.metrics.{name}", config.metric
    try:
        make = places.load(path) if {".", ":"}.intersection(path) else _of_torchmetrics(path)
    except ModuleNotFoundError as error:
        fix = "pip install 'nexus-trainer[metrics]'" if error.name == "torchmetrics" else error
        raise ConfigError(f"{key} is '{path}', which cannot be imported: {fix}") from error
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    try:
        return cast(Metric, cast(Any, make)(**config.args))
    except (TypeError, ValueError) as error:
        said = f"{places.shown(path)} does not take {config.args}"
        raise ConfigError(f"{key}: {said}: {error}") from error


def _of_torchmetrics(name: str) -> object:
    """What torchmetrics has by a name; without the path of a place it is no code of a config's."""
    module = importlib.import_module("torchmetrics")
    if not hasattr(module, name):
        raise ConfigError(f"torchmetrics has no '{name}'.{suggestion(name, dir(module))}")
    return getattr(module, name)


def part_at(whole: Any, place: Place, usual: tuple[str, ...], default: Any, key: str) -> Any:
    """A part of a batch or an output: the one at a place, or one with a usual name."""
    keys = list(whole) if isinstance(whole, Mapping) else list(getattr(whole, "__dict__", ()))
    if place is None:
        name = next((name for name in usual if name in keys), None)
        found = default if name is None else _part(whole, name)
        if found is None or isinstance(found, Mapping):
            raise ConfigError(f"{key} is not set, and none of {', '.join(usual)} is in {keys}")
        return found
    try:
        return _part(whole, place)
    except (LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{key} is {place!r}, which does not exist; there are {keys}") from error


def _part(whole: Any, place: str | int) -> Any:
    by_name = isinstance(place, str) and not isinstance(whole, Mapping)
    return getattr(whole, cast(str, place)) if by_name else whole[place]


def together(metric: Metric, seen: list[int], ranks: Ranks, key: str) -> Any:
    """A metric with the rows of all processes; of those that have seen none, nothing is asked."""
    if ranks.size == 1:
        return metric
    if not hasattr(metric, "merge_state"):
        raise ConfigError(
            f"{key}: {type(metric).__name__} cannot be merged over {ranks.size} "
            "processes; give it merge_state(other), or use a torchmetrics metric"
        )
    own = copy.deepcopy(metric)
    own = own.cpu() if isinstance(own, nn.Module) else own
    parts = [part for part in gather(ranks, own if seen[ranks.rank] else None) if part is not None]
    *others, merged = cast(list[Any], parts)
    try:
        for other in reversed(others):  # what is merged comes before what is there
            merged.merge_state(other)
    except RuntimeError:  # of torchmetrics, with a reduction of its own
        return metric
    if hasattr(merged, "distributed_available_fn"):
        merged.distributed_available_fn = _is_alone
    return merged


def _is_alone() -> bool:
    return False


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a result, by name: of several, each has its key or its place behind it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(f"{name}_{key}", item)
        return
    found = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
    if found.ndim == 0:
        yield name, float(found)
        return
    for place, item in enumerate(found.flatten().tolist()):
        yield f"{name}_{place}", float(item)
