"""The state of a run, typed: gathered, fully checked, then applied all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, NotRequired, Protocol, TypeAlias, TypedDict, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_core.data import DataState
from nexus_core.device import RandomState, random_state, set_random_state
from nexus_core.errors import CheckpointError, PluginError, hint_add
from nexus_core.intervals import TrainState
from nexus_core.meter import Meter
from nexus_core.plugin import Plugin, StateDict

__all__ = ["PluginState", "Snapshot", "apply", "check", "check_parts", "gather", "migrated"]


class PluginState(TypedDict):
    """A plugin's saved state and its `state_version`."""

    version: int
    state: StateDict


class Snapshot(TypedDict):
    """Everything needed to continue a run: what a checkpoint stores."""

    model: dict[str, Tensor]
    optimizer: StateDict
    train: dict[str, int | float]  # counters, including the data cursor
    pending: dict[str, list[float]]  # the sum and units of each metric since the last log
    metrics: dict[str, float]  # last value of each metric
    random: RandomState
    plugins: dict[str, PluginState]  # by name
    data: NotRequired[DataState | None]  # which data the cursor is in
    due: NotRequired[list[str]]  # "evaluate": the run stopped before its evaluation finished
    extras: NotRequired[dict[str, StateDict]]  # what `on_save` added, by the plugin's name


OPTIONAL = frozenset({"data", "due", "extras"})
"""Parts that snapshots of earlier releases lack."""


class Parts(Protocol):
    """The parts of an engine that a snapshot covers."""

    model: nn.Module
    optimizer: Optimizer
    state: TrainState
    meter: Meter
    plugins: dict[str, Plugin[Any]]

    @property
    def metrics(self) -> dict[str, float]: ...


Load: TypeAlias = tuple[Plugin[Any], StateDict]
_COUNTERS = frozenset(counter.name for counter in fields(TrainState))
_FAULTS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)


def gather(engine: Parts, data: DataState | None, owed: bool = False) -> Snapshot:
    """Read the state of an engine, tensors by reference."""
    states = {name: plugin.state_dict() for name, plugin in engine.plugins.items()}
    return {
        "model": engine.model.state_dict(),
        "optimizer": engine.optimizer.state_dict(),
        "train": asdict(engine.state),
        "pending": engine.meter.state_dict(),
        "metrics": dict(engine.metrics),
        "random": random_state(),
        "plugins": {
            name: {"version": engine.plugins[name].state_version, "state": state}
            for name, state in states.items()
            if state
        },
        "data": data,
        "extras": {},
        "due": ["evaluate"] if owed else [],
    }


def check_parts(snapshot: Snapshot, plugin: str) -> None:
    """Reject what a plugin put where it cannot be restored.

    Raises:
        PluginError: the snapshot has an unknown part or counter.
    """
    strange = snapshot.keys() - Snapshot.__annotations__.keys()
    strange |= snapshot["train"].keys() - _COUNTERS
    if strange:
        raise PluginError(
            f"plugin '{plugin}' put '{min(strange)}' into the snapshot, which has no such part; "
            f"put it into snapshot['extras']['{plugin}'], or return it from state_dict"
        )


def check(engine: Parts, snapshot: Snapshot) -> list[Load]:
    """Check that a snapshot fits the engine, without changing anything.

    Returns:
        The plugins that get a state, converted to their current layout.

    Raises:
        CheckpointError: a part of it is missing, or does not fit model, optimizer or plugins.
    """
    if missing := Snapshot.__annotations__.keys() - OPTIONAL - snapshot.keys():
        raise CheckpointError(f"the snapshot has no part '{min(missing)}'")
    if strangers := snapshot["plugins"].keys() - engine.plugins.keys():
        raise CheckpointError(
            f"the checkpoint has state of plugin '{min(strangers)}', which is not in this "
            "run; add it: ",
            hint_add(min(strangers)),
        )
    _check_model(engine.model, snapshot["model"])
    _check_optimizer(engine.optimizer, cast(dict[str, Any], snapshot["optimizer"]))
    if strange := snapshot["train"].keys() - _COUNTERS:
        raise CheckpointError(f"the snapshot has an unknown counter '{min(strange)}'")
    with _as_misfit():
        return [
            (plugin, migrated(plugin, saved))
            for name, saved in snapshot["plugins"].items()
            for plugin in [engine.plugins[name]]
        ]


def apply(engine: Parts, snapshot: Snapshot, loads: list[Load]) -> None:
    """Apply a checked snapshot to its engine; the optimizer takes over its tensors.

    Plugins load their state twice: first as a rehearsal, undone if one of them raises, so that a
    failed load leaves the engine unchanged; then after model and optimizer, since some of them put
    other weights into the model.

    Raises:
        CheckpointError: a plugin cannot load its state.
    """
    before = [(plugin, _state_of(plugin), dict(vars(plugin))) for plugin, _ in loads]
    try:
        _load(loads)
        with _as_misfit():
            engine.optimizer.load_state_dict(cast(dict[str, Any], snapshot["optimizer"]))
            engine.model.load_state_dict(snapshot["model"])
    except CheckpointError as error:
        _put_back(before, error)
        raise
    _load(loads)
    for counter in fields(TrainState):
        setattr(engine.state, counter.name, snapshot["train"].get(counter.name, counter.default))
    engine.meter.load_state_dict(snapshot["pending"])
    engine.metrics.clear()
    engine.metrics.update(snapshot["metrics"])
    set_random_state(snapshot["random"])


def _put_back(
    before: list[tuple[Plugin[Any], StateDict, dict[str, Any]]], error: CheckpointError
) -> None:
    """Restore plugins' attributes, including their nested states."""
    for plugin, state, attributes in before:
        vars(plugin).clear()
        vars(plugin).update(attributes)
        try:
            if state:
                plugin.load_state_dict(state)
        except _FAULTS as other:
            error.add_note(f"plugin '{plugin.name}' cannot reload its own state: {other!r}")


def _load(loads: list[Load]) -> None:
    for plugin, state in loads:
        with _as_refusal(plugin):
            plugin.load_state_dict(state)


def _state_of(plugin: Plugin[Any]) -> StateDict:
    with _as_refusal(plugin):
        return plugin.state_dict()


@contextmanager
def _as_refusal(plugin: Plugin[Any]) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise CheckpointError(
            f"plugin '{plugin.name}' cannot load its saved state: {_words(error)}; resume with "
            "the config that wrote it, and let the plugin create what loading needs in "
            "__init__ or on_build, not in on_start"
        ) from error


def migrated(plugin: Plugin[Any], saved: PluginState) -> StateDict:
    """The saved state of a plugin in the form of its current version."""
    if saved["version"] == plugin.state_version:
        return saved["state"]
    return plugin.migrate(saved["state"], saved["version"])


def _check_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    if (odd := sorted(own.keys() ^ saved.keys())) and not any(map(_renames, model.modules())):
        where = "the model" if odd[0] in own else "the checkpoint"
        raise _misfit(f"only {where} has '{odd[0]}' ({len(odd)} names differ)")
    for name in own.keys() & saved.keys():
        one, other = own[name], saved[name]
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        if both and one.shape != other.shape and not nn.parameter.is_lazy(one):
            raise _misfit(f"'{name}' is {tuple(other.shape)}, but {tuple(one.shape)} in the model")


def _renames(module: nn.Module) -> bool:
    """Whether a module may load names that differ from those it saves."""
    plain = type(module)._load_from_state_dict is nn.Module._load_from_state_dict
    return not plain or bool(module._load_state_dict_pre_hooks)


def _check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    own = optimizer.state_dict()
    if own.keys() != saved.keys():
        raise _misfit(f"the optimizer's state has {sorted(saved)}, and {sorted(own)} here")
    nested = own.get("optimizers")
    pairs = [(own, saved)]
    if nested is not None:
        if list(nested) != list(saved["optimizers"]):
            raise _misfit(f"it has the optimizers {list(saved['optimizers'])}, not {list(nested)}")
        pairs = [(nested[name], saved["optimizers"][name]) for name in nested]
    for mine, other in pairs:
        sizes = [[len(group["params"]) for group in s["param_groups"]] for s in (mine, other)]
        if sizes[0] != sizes[1]:
            raise _misfit(
                f"its optimizer has groups of {sizes[1]} parameters, this one of {sizes[0]}"
            )


@contextmanager
def _as_misfit() -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise _misfit(_words(error)) from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _misfit(why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint does not fit this run: {why}; resume with the config that wrote it "
        "(config.yaml in its folder)"
    )
