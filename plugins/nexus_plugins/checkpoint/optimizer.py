"""Restore an optimizer: check whose state it is, and which settings have changed.

An optimizer loads whatever it is given: the moments of another parameter, the settings of the run
that wrote them, and a state of the wrong size, which its fused kernels then read out of bounds. So
class and parameters are compared by name, this run's settings apply where they differ from those of
the run that wrote the checkpoint, and each state is compared with what a torch optimizer keeps for
a small parameter of the same kind.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam

from nexus_core.errors import CheckpointError, hint_set
from nexus_core.optimizers import members
from nexus_core.processes import is_sharded, local_part
from nexus_plugins._shared.checkpoints.folder import Json
from nexus_plugins.checkpoint.codec import TensorBag, decode, encode

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["describe_optimizer", "take_over"]

_HOW = ("foreach", "fused", "capturable", "differentiable")
"""Settings that only affect how the update is computed; this run's values are used."""
_SIZES = (2, 3, 5, 7, 11, 13, 17, 19)
"""A small parameter's sizes, all different, so that a state's shape shows what it follows."""

Settings = dict[str, Any]


def describe_optimizer(engine: Engine) -> dict[str, Json]:
    """The optimizer's entry in `lock.json`: its class, and each group's parameters and settings.

    Call it before anything is restored, while the settings are those it was built with.
    """
    named = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    groups: list[Json] = []
    for group in engine.optimizer.param_groups:
        names: list[Json] = [
            named.get(id(parameter), f"of shape {tuple(parameter.shape)}, not of the model")
            for parameter in group["params"]
        ]
        groups.append({"parameters": names, "settings": _plain_settings(group)})
    kind = type(engine.optimizer)
    return {"class": f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}", "groups": groups}


def take_over(
    snapshot: Mapping[str, Any],
    theirs: object,
    ours: Mapping[str, Json],
    engine: Engine,
    *,
    force: bool,
    whose: str,
) -> list[str]:
    """Prepare a saved optimizer state for loading into this run's optimizer.

    Args:
        snapshot: its groups get this run's settings where those differ from what the other run was
            built with, its tensors the layout of the parameters.
        theirs: what `describe_optimizer` returned when the checkpoint was written.
        ours: what it returns for this run.
        engine: this run's engine.
        force: start with a fresh state if the optimizer differs.
        whose: the plugin that this is a setting of.

    Returns:
        What differs, in words.

    Raises:
        CheckpointError: the state belongs to another optimizer, or is invalid.
    """
    saved: Settings = snapshot["optimizer"]
    if fault := _other_kind(theirs, ours) or _other_sizes(saved, engine.optimizer):
        if force:
            saved.clear()
            saved.update(_copied(engine.optimizer.state_dict()))
            return [f"{fault}; the optimizer starts with a fresh state"]
        if other := _other_model(snapshot["model"], engine):
            raise CheckpointError(other)
        raise CheckpointError(
            f"{fault}, so its state cannot be used; build the optimizer as the run that wrote "
            "the checkpoint did, or start with a fresh state: ",
            hint_set(f"{whose}.resume_policy", "force"),
        )
    said = []
    try:
        for number, (state, group, live, owner) in enumerate(_pairs(saved, engine.optimizer)):
            before, now = _settings_of(theirs, number), _settings_of(ours, number)
            changes = {key: now[key] for key in now if key in before and now[key] != before[key]}
            said += [f"the optimizer's {key} is {now[key]}, was {before[key]}" for key in changes]
            _set(group, live, changes)
            _check_settings(group, live)
            _check_states(state, group, live, owner)
    except CheckpointError as error:
        raise CheckpointError(_other_model(snapshot["model"], engine) or str(error)) from error
    made_by_plugin = any(plugin.slot == "optimizer" for plugin in engine.plugins.values())
    return [] if made_by_plugin else list(dict.fromkeys(said))  # its settings are compared anyway


def _pairs(
    saved: Settings, optimizer: Optimizer
) -> Iterator[tuple[dict[int, Any], Settings, Settings, Optimizer]]:
    """For each group: its optimizer's states, the saved group, the current group, the optimizer."""
    for table, owner in _each(saved, optimizer):
        for group, live in zip(table["param_groups"], owner.param_groups, strict=True):
            yield table["state"], group, live, owner


def _each(saved: Settings, optimizer: Optimizer) -> list[tuple[Settings, Optimizer]]:
    """The saved table of each optimizer, whether there is one or several."""
    named = members(optimizer)
    several: Settings = saved.get("optimizers", {"": saved})
    return [(several[name], owner) for name, owner in named.items() if name in several]


def _other_kind(theirs: object, ours: Mapping[str, Json]) -> str:
    """How class or parameters differ, in words; empty if they do not, or if unknown."""
    if not isinstance(theirs, dict):
        return ""
    if theirs.get("class", ours["class"]) != ours["class"]:
        return f"the optimizer is {ours['class']}, was {str(theirs['class'])[:80]}"
    before, now = _names(theirs), _names(ours)
    for number, (one, other) in enumerate(zip(before, now, strict=False)):
        if one != other:
            return f"parameter {number} of the optimizer is {other}, was {str(one)[:80]}"
    if before and len(before) != len(now):
        return f"the optimizer has {len(now)} parameters, had {len(before)}"
    return ""


def _other_model(weights: Mapping[str, Any], engine: Engine) -> str:
    """How the model differs, which explains other differences; empty if it does not."""
    now = engine.model.state_dict()
    for name in (*weights, *now):
        before, here = (getattr(table.get(name), "shape", None) for table in (weights, now))
        if before != here:
            shapes = (str(tuple(s)) if s is not None else "not there" for s in (here, before))
            return (
                "the checkpoint does not fit this run: the model's {} is {}, was {}; resume with "
                "the config that wrote it".format(str(name)[:80], *shapes)
            )
    return ""


def _other_sizes(saved: Settings, optimizer: Optimizer) -> str:
    names = list(saved.get("optimizers", {"": None}))
    if names != list(members(optimizer)):
        return f"the optimizers are {list(members(optimizer))}, were {str(names)[:80]}"
    tables = [table for table, _ in _each(saved, optimizer)]
    before = [len(group["params"]) for table in tables for group in table["param_groups"]]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if before == now:
        return ""
    return f"the optimizer has groups of {now} parameters, had {str(before)[:80]}"


def _names(described: Mapping[str, Any]) -> list[object]:
    groups = described.get("groups")
    found: list[object] = []
    for group in groups if isinstance(groups, list) else []:
        names = group.get("parameters") if isinstance(group, dict) else None
        found += names if isinstance(names, list) else []
    return found


def _settings_of(described: object, number: int) -> Settings:
    """The recorded settings of a group; empty if there are none."""
    groups = described.get("groups") if isinstance(described, dict) else None
    group = groups[number] if isinstance(groups, list) and number < len(groups) else None
    settings = group.get("settings") if isinstance(group, dict) else None
    found = decode(cast(Json, settings), {}) if isinstance(settings, dict) else {}
    return cast(Settings, found) if isinstance(found, dict) else {}


def _plain_settings(group: Settings) -> Json:
    """A group's settings as JSON, without those in `_HOW` and those that the engine adds."""
    plain = {}
    for key, value in group.items():
        if key in ("params", "initial_lr", *_HOW):
            continue
        try:
            plain[key] = encode(_number(value), TensorBag())
        except CheckpointError:  # a custom object, which cannot be compared
            continue
    return cast(Json, plain)


def _number(value: object) -> object:
    """The value, with one-element tensors and NumPy scalars as Python numbers."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return tuple(_number(item) for item in value)
    return value.item() if hasattr(value, "dtype") and hasattr(value, "item") else value


def _set(group: Settings, live: Settings, changes: Settings) -> None:
    """Update a saved group with the settings that this run changed or added."""
    for key, value in live.items():
        if key != "params" and (key in changes or key in _HOW or key not in group):
            group[key] = value
    if "lr" in changes:
        group["initial_lr"] = live.get("initial_lr", live["lr"])


def _check_settings(group: Settings, live: Settings) -> None:
    """Check that each setting has the type that this run's optimizer expects."""
    for key, value in live.items():
        if key != "params" and not _alike(group[key], value):
            raise CheckpointError(
                f"the optimizer's {key} is {str(group[key])[:80]} in the checkpoint; expected "
                f"a value such as {str(value)[:80]}"
            )


def _alike(saved: object, live: object) -> bool:
    if isinstance(live, bool) or isinstance(saved, bool):
        return isinstance(saved, bool) and isinstance(live, bool | None)
    if isinstance(live, int | float):
        return isinstance(saved, Tensor | int | float) and _finite(saved)
    if isinstance(live, tuple | list):
        same = isinstance(saved, tuple | list) and len(saved) == len(live)
        return same and all(map(_alike, cast(Sequence[object], saved), live))
    if isinstance(live, Tensor):
        return isinstance(saved, Tensor | int | float) and _finite(saved)
    return live is None or isinstance(saved, type(live))


def _finite(value: Tensor | int | float) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and math.isfinite(_real(value))
    return abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)


def _copied(state: Mapping[str, Any]) -> Settings:
    return {"state": dict(state["state"]), "param_groups": [dict(g) for g in state["param_groups"]]}


# -- the states, compared with those of a small parameter


@dataclass(frozen=True)
class _Kept:
    """One named entry of an optimizer's state for a parameter.

    Args:
        value: its value for the small parameter.
        sizes: sizes of the small parameter.
    """

    value: object
    sizes: tuple[int, ...]

    @property
    def is_number(self) -> bool:
        """Whether it is a scalar for every parameter shape."""
        return isinstance(self.value, int | float) or (
            isinstance(self.value, Tensor) and self.value.ndim == 0
        )

    def shape_for(self, parameter: Tensor) -> tuple[int, ...] | None:
        """Its required shape for a parameter; None if unknown."""
        if not isinstance(self.value, Tensor):
            return None
        shape = tuple(self.value.shape)
        if shape == ():
            return ()
        if len(shape) != parameter.ndim:
            return None
        pairs = list(zip(shape, self.sizes, tuple(parameter.shape), strict=True))
        known = all(size in (1, own) for size, own, _ in pairs)
        return tuple(size if size == 1 else real for size, _, real in pairs) if known else None


def _check_states(
    states: dict[int, Any], group: Settings, live: Settings, optimizer: Optimizer
) -> None:
    """Check that each parameter of a group has the states that the optimizer will read."""
    kind = _made_by_torch(optimizer, live)
    known: dict[object, dict[str, _Kept]] = {}
    tried: set[object] = set()
    for number, parameter in zip(group["params"], live["params"], strict=True):
        state = states.get(number, {})
        if state == {}:
            continue  # nothing has been kept yet
        if not isinstance(state, dict):
            raise CheckpointError(f"the optimizer's state of parameter {number} is invalid")
        if kind is None:
            _check_unknown(state, number, parameter)
            continue
        own = local_part(parameter)
        like = own.ndim, own.dtype, own.device
        if like not in known:
            known[like] = _trial(kind, group, own, {}, number)
        for name, kept in known[like].items():
            state[name] = _checked(state.get(name), kept, parameter, name, number)
        scalars = {name: state[name] for name, kept in known[like].items() if kept.is_number}
        if scalars and (seen := (like, repr(scalars))) not in tried:
            tried.add(seen)
            _trial(kind, group, own, scalars, number)  # with the right shapes, or it would crash
    if kind is SGD:
        _fill_momentum(states, group, live)


def _fill_momentum(states: dict[int, Any], group: Settings, live: Settings) -> None:
    """Fill in zero momentum if only some parameters have one.

    SGD does the same, but its fused kernel needs all or none.
    """
    numbers = [n for n, p in zip(group["params"], live["params"], strict=True) if p.requires_grad]
    there = [number for number in numbers if states.get(number)]
    if not (group.get("momentum") and group.get("fused") and 0 < len(there) < len(numbers)):
        return
    if group["dampening"]:
        raise CheckpointError(
            f"the optimizer has momentum for parameter {there[0]} but not for all, which its "
            "fused kernel does not support; resume with fused=False"
        )
    for number, parameter in zip(group["params"], live["params"], strict=True):
        if parameter.requires_grad and not states.get(number):
            states[number] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}


def _made_by_torch(optimizer: Optimizer, live: Settings) -> type[Optimizer] | None:
    """The torch class that updates this group, alone or as part of another optimizer.

    None for other classes, and for two whose step a trial cannot run; their kernels are safe.
    """
    parts = [part for value in vars(optimizer).values() for part in _optimizers(value)]
    for one in (*parts, optimizer):
        if any(group is live for group in one.param_groups):
            kind = type(one)
            known = kind.__module__.startswith("torch.optim")
            return kind if known and kind not in (LBFGS, SparseAdam) else None
    return None


def _optimizers(value: object) -> list[Optimizer]:
    items = value if isinstance(value, tuple | list) else (value,)
    return [item for item in items if isinstance(item, Optimizer)]


def _trial(
    kind: type[Optimizer], group: Settings, like: Tensor, scalars: Settings, number: int
) -> dict[str, _Kept]:
    """The state that the optimizer keeps for a small parameter after a step with zero gradient.

    Args:
        kind: the optimizer's class.
        group: the settings.
        like: a parameter of the same kind.
        scalars: scalars of its saved state, loaded into the trial.
        number: index of the parameter, for errors.

    Raises:
        CheckpointError: it fails with these settings and numbers.
    """
    sizes = _SIZES[: like.ndim]
    small = torch.zeros(sizes, dtype=like.dtype, device=like.device, requires_grad=True)
    small.grad = torch.zeros_like(small)
    takes = inspect.signature(kind).parameters
    settings = {key: value for key, value in group.items() if key in takes and key != "params"}
    try:
        optimizer: Any = kind([small], **settings)
        optimizer.param_groups[0].update({k: v for k, v in group.items() if k != "params"})
        optimizer.step()
        if scalars:
            table = optimizer.state_dict()
            table["state"].get(0, {}).update(scalars)
            optimizer.load_state_dict(copy.deepcopy(table))  # loading would change these tensors
            optimizer.step()
    except Exception as error:  # any error means that the settings or state are invalid
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the optimizer cannot use the checkpoint's state for parameter {number}: "
            f"{type(error).__name__}: {said}"
        ) from error
    return {name: _Kept(value, sizes) for name, value in optimizer.state[small].items()}


def _checked(value: object, kept: _Kept, parameter: Tensor, name: str, number: int) -> object:
    """The value, in the parameter's layout, if it is what the optimizer keeps under this name."""
    wanted, what = kept.value, f"the optimizer's {name} of parameter {number}"
    if not isinstance(wanted, Tensor):
        if _alike(value, wanted):
            return value
        raise CheckpointError(f"{what} is {str(value)[:80]}, not like {wanted}")
    shape = kept.shape_for(parameter)
    counts = shape == () and (parameter.ndim > 0 or name == "step")
    if counts and isinstance(value, int | float) and _is_count(value):
        return value  # torch optimizers convert it to a tensor
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what} is missing or not a tensor")
    if shape is not None and tuple(value.shape) != shape:
        raise CheckpointError(
            f"{what} does not have the shape {shape}; resume with the config that wrote the "
            "checkpoint"
        )
    floating = wanted.is_floating_point() and value.is_floating_point()
    if value.dtype != wanted.dtype and not floating:
        raise CheckpointError(f"{what} is {value.dtype}, not {wanted.dtype}")
    if counts and not _is_count(value):
        raise CheckpointError(f"{what} is {value.item()}")
    return _laid_out(value, parameter)


def _is_count(value: Tensor | int | float) -> bool:
    return not isinstance(value, bool) and _finite(value) and _real(value) >= 0


def _real(value: Tensor | int | float) -> float:
    """The tensor in a dtype that PyTorch can compute with."""
    return float(value.double().item() if isinstance(value, Tensor) else value)


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """The values in the parameter's memory layout, which fused kernels rely on."""
    plain = value.shape == parameter.shape and not (is_sharded(value) or is_sharded(parameter))
    if not plain or value.stride() == parameter.stride():
        return value
    laid = torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False)
    return laid.copy_(value)


def _check_unknown(state: Settings, number: int, parameter: Tensor) -> None:
    """Check the states of other optimizers: moments must have the parameter's shape."""
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
        value = state.get(name)
        fits = isinstance(value, Tensor) and value.shape == parameter.shape
        if value is not None and not fits:
            raise CheckpointError(
                f"the optimizer's {name} of parameter {number} does not have the shape "
                f"{tuple(parameter.shape)}; resume with the config that wrote the checkpoint"
            )
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = _laid_out(value, parameter)
