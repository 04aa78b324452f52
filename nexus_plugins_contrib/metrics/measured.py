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
    """A metric with the interface of torchmetrics."""

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
    """Create the metric that the settings describe.

    Raises:
        ConfigError: it does not exist, or rejects the arguments.
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
    """Look up a name in torchmetrics; unlike an import path, it cannot load other code."""
    module = importlib.import_module("torchmetrics")
    if not hasattr(module, name):
        raise ConfigError(f"torchmetrics has no '{name}'.{suggestion(name, dir(module))}")
    return getattr(module, name)


def part_at(whole: Any, place: Place, usual: tuple[str, ...], default: Any, key: str) -> Any:
    """An entry of a batch or output: at a key or index, or with a usual name."""
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
    """A metric merged over all ranks; ranks that have seen no rows are skipped."""
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
        for other in reversed(others):  # merged states are put in front
            merged.merge_state(other)
    except RuntimeError:  # a torchmetrics metric with a custom reduction
        return metric
    if hasattr(merged, "distributed_available_fn"):
        merged.distributed_available_fn = _is_alone
    return merged


def _is_alone() -> bool:
    return False


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a result, by name; of several, each with its key or index as suffix."""
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
