"""Validate a snapshot before anything is restored from it.

Hashes prove that a checkpoint is unchanged, not who wrote it. This checks what would otherwise fail
obscurely deep in a library, or read out of bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from nexus_core.data import DataState
from nexus_core.errors import CheckpointError
from nexus_core.holders import Held
from nexus_core.intervals import TrainState
from nexus_core.snapshot import OPTIONAL, Snapshot
from nexus_plugins._shared.generators import check_generators
from nexus_plugins.checkpoint.kinds import Kinds, check_kinds

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["checked"]

_REQUIRED = {"fingerprint", "batch_size", "row", "loader"}


def checked(tree: Mapping[str, object], engine: Engine, kinds: Mapping[str, Kinds]) -> Snapshot:
    """Validate the tree and return it as a snapshot.

    Raises:
        CheckpointError: it is not a snapshot, or does not fit model and optimizer.
    """
    known = Snapshot.__annotations__.keys()
    _require(known - OPTIONAL <= tree.keys() <= known, f"has the parts {', '.join(tree)}")
    _check_model(tree["model"])
    _check_optimizer(tree["optimizer"])
    _check_counters(tree["train"])
    _check_metrics(tree["pending"], tree["metrics"])
    _check_generators(tree["random"])
    _check_plugins(tree["plugins"], engine, kinds)
    _check_data(tree.get("data"))
    _check_extras(tree.get("extras", {}))
    _require(tree.get("due", []) in ([], ["evaluate"]), "has an unknown pending task")
    return cast(Snapshot, tree)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckpointError(f"state.json is not a valid run state: it {otherwise}")


def _check_model(model: object) -> None:
    _require(isinstance(model, dict) and all(isinstance(key, str) for key in model), "has no model")


def _check_optimizer(saved: object) -> None:
    several = saved.get("optimizers") if isinstance(saved, dict) else None
    if several is None:
        _check_one_optimizer(saved)
        return
    _require(
        isinstance(several, dict) and len(cast(dict[str, object], saved)) == 1, "has no optimizer"
    )
    for one in several.values():
        _check_one_optimizer(one)


def _check_one_optimizer(saved: object) -> None:
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
    _require(
        whole and table["state"].keys() <= set(numbers), "misnumbers the optimizer's parameters"
    )
    _require(len(set(numbers)) == len(numbers), "gives two optimizer parameters the same number")


def _check_counters(train: object) -> None:
    expected = asdict(TrainState())
    _require(isinstance(train, dict) and train.keys() == expected.keys(), "lacks counters")
    for name, value in cast(dict[str, object], train).items():
        kinds = (int, float) if name == "seconds" else (int,)
        _require(type(value) in kinds, f"counts {name} as {str(value)[:80]}")
        possible = expected[name] <= cast(float, value) < 1 << 63
        _require(possible, f"counts {name} as {str(value)[:80]}")


def _check_metrics(pending: object, metrics: object) -> None:
    _require(isinstance(pending, dict) and isinstance(metrics, dict), "has no metrics")
    for sums in cast(dict[str, object], pending).values():
        _require(isinstance(sums, list) and len(sums) % 2 == 0 and _numbers(sums), "has wrong sums")
    _require(_numbers(list(cast(dict[str, object], metrics).values())), "has invalid metrics")


def _numbers(values: list[object]) -> bool:
    """Whether they are numbers that a float can hold."""
    return all(type(v) is float or (type(v) is int and abs(v) < 1 << 63) for v in values)


def _check_generators(saved: object) -> None:
    kinds = {"python", "numpy", "torch", "devices"}
    good = isinstance(saved, dict) and kinds <= saved.keys() <= {*kinds, "accelerator", "peers"}
    _require(good, "has no generators")
    table = cast(dict[str, Any], saved)
    _require(isinstance(table.get("accelerator", ""), str), "has generators of an unknown device")
    peers = table.get("peers", [])
    _require(isinstance(peers, list), "has invalid generators of other ranks")
    for other in peers:
        _require(isinstance(other, dict) and "peers" not in other, "nests generators")
        _check_generators(other)
    check_generators(table)


def _check_data(data: object) -> None:
    if data is None:
        return
    _require(
        isinstance(data, dict)
        and _REQUIRED <= data.keys() <= DataState.__annotations__.keys()
        and isinstance(data["fingerprint"], str | None)
        and (data["batch_size"] is None or _is_count(data["batch_size"], 1))
        and _is_count(data["row"], 0)
        and _is_count(data.get("processes", 1), 1)
        and isinstance(data.get("peers", []), list),
        "does not say which data it used",
    )
    table = cast(dict[str, Any], data)
    for place in (table["loader"], *table.get("peers", [])):
        _check_place(place)


def _check_place(place: object) -> None:
    _require(isinstance(place, dict | None), "has no valid data position")
    if isinstance(place, dict):
        good = (
            place.keys() == Held.__annotations__.keys()
            and isinstance(place["now"], dict)
            and isinstance(place["start"], dict)
            and isinstance(place["next"], str | None)
            and isinstance(place["draws"], bool)
        )
        _require(good, "has no valid data position")
        if place["random"] is not None:
            _check_generators(place["random"])


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 63


def _check_extras(extras: object) -> None:
    _require(
        isinstance(extras, dict)
        and all(isinstance(n, str) and isinstance(state, dict) for n, state in extras.items()),
        "has invalid additions of plugins",
    )


def _check_plugins(plugins: object, engine: Engine, kinds: Mapping[str, Kinds]) -> None:
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
                f"the state of plugin '{name}' has version {saved['version']}, but this release "
                f"reads up to {plugin.state_version}; install the release that wrote it"
            )
        if plugin is not None and saved["version"] == plugin.state_version:
            check_kinds(saved["state"], kinds.get(str(name), ""), f"plugin '{name}'")
