"""The shape that a snapshot must have before anything is restored from it.

Hashes say that a checkpoint is as it was written, not who wrote it. What is checked here is what
would otherwise end as an obscure error deep in a library, or read memory that is not its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from nexus_core.errors import CheckpointError
from nexus_core.state import Snapshot, TrainState

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["checked"]


def checked(tree: Mapping[str, object], engine: Engine) -> Snapshot:
    """Return the tree as the snapshot that it is.

    Raises:
        CheckpointError: it is none, or none of such a model and optimizer.
    """
    _require(tree.keys() == Snapshot.__annotations__.keys(), f"has the parts {', '.join(tree)}")
    _check_model(tree["model"])
    _check_optimizer(tree["optimizer"])
    _check_counters(tree["train"])
    _check_metrics(tree["pending"], tree["metrics"])
    _check_generators(tree["random"])
    _check_plugins(tree["plugins"], engine)
    return cast(Snapshot, tree)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckpointError(f"state.json is not the state of a run: it {otherwise}")


def _check_model(model: object) -> None:
    _require(isinstance(model, dict) and all(isinstance(key, str) for key in model), "has no model")


def _check_optimizer(saved: object) -> None:
    _require(
        isinstance(saved, dict)
        and saved.keys() >= {"state", "param_groups"}
        and isinstance(saved["state"], dict)
        and isinstance(saved["param_groups"], list)
        and all(
            isinstance(group, dict) and isinstance(group.get("params"), list)
            for group in saved["param_groups"]
        ),
        "has no optimizer",
    )
    table = cast(dict[str, Any], saved)
    numbers = [number for group in table["param_groups"] for number in group["params"]]
    whole = all(type(number) is int for number in [*numbers, *table["state"]])
    _require(whole and table["state"].keys() <= set(numbers), "numbers parameters oddly")
    _require(len(set(numbers)) == len(numbers), "numbers two parameters alike")


def _check_counters(train: object) -> None:
    expected = asdict(TrainState())
    _require(isinstance(train, dict) and train.keys() == expected.keys(), "lacks counters")
    for name, value in cast(dict[str, object], train).items():
        kinds = (int, float) if name == "seconds" else (int,)
        _require(type(value) in kinds, f"counts {name} as {str(value)[:80]}")
        possible = expected[name] <= cast(float, value) < float("inf")
        _require(possible, f"counts {name} as {str(value)[:80]}")


def _check_metrics(pending: object, metrics: object) -> None:
    _require(isinstance(pending, dict) and isinstance(metrics, dict), "has no metrics")
    for sums in cast(dict[str, object], pending).values():
        _require(isinstance(sums, list) and len(sums) == 2 and _numbers(sums), "has odd sums")
    _require(_numbers(list(cast(dict[str, object], metrics).values())), "has odd metrics")


def _numbers(values: list[object]) -> bool:
    return all(type(value) in (int, float) for value in values)


def _check_generators(saved: object) -> None:
    """Try the states of the generators on generators that nobody uses."""
    kinds = {"python", "numpy", "torch", "devices"}
    good = isinstance(saved, dict) and kinds <= saved.keys() <= {*kinds, "peers"}
    _require(good, "has no generators")
    table = dict(cast(dict[str, Any], saved))
    peers = table.pop("peers", [])
    _require(isinstance(peers, list), "has odd generators of other processes")
    for other in peers:
        _require(isinstance(other, dict) and "peers" not in other, "nests generators")
        _check_generators(other)
    try:
        version, words, gauss = table["python"]
        random.Random().setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = table["numpy"]
        _require(type(position) is int and 0 <= position <= 624, "has odd numpy generators")
        key_array = np.array(keys, dtype=np.uint32)
        np.random.RandomState().set_state((name, key_array, position, has_gauss, cached))
        torch.Generator().set_state(table["torch"])
        _require(all(isinstance(state, Tensor) for state in table["devices"]), "has odd devices")
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError, KeyError) as error:
        raise CheckpointError(f"state.json holds impossible generators: {error}") from error


def _check_plugins(plugins: object, engine: Engine) -> None:
    _require(isinstance(plugins, dict), "has no plugin states")
    for name, saved in cast(dict[object, Any], plugins).items():
        good = (
            isinstance(name, str)
            and isinstance(saved, dict)
            and saved.keys() == {"version", "state"}
            and type(saved["version"]) is int
            and isinstance(saved["state"], dict)
        )
        _require(good, f"has no readable state of plugin '{str(name)[:80]}'")
        plugin = engine.plugins.get(str(name))
        if plugin is not None and saved["version"] > plugin.state_version:
            raise CheckpointError(
                f"the state of plugin '{name}' is of version {saved['version']}, and this release "
                f"reads up to {plugin.state_version}; install the release that wrote it"
            )
