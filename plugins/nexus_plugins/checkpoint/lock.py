"""What wrote a checkpoint, and how the run that resumes from it differs.

Each setting has a policy for a difference. `Field(..., json_schema_extra={"resume": "locked"})`
makes it an error (the batch size, which would move the data cursor), `"ignored"` accepts it
silently (where to log), and any other difference is applied and reported.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from nexus_core.data import DataState
from nexus_core.errors import CheckpointError, hint_add, hint_set
from nexus_core.places import in_run_folder, used
from nexus_core.plan import installed
from nexus_core.plugin import Plugin
from nexus_plugins._shared.checkpoints.folder import Json
from nexus_plugins._shared.numerics import differences, numerics

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = [
    "Difference",
    "Policy",
    "compare",
    "compare_data",
    "compare_numerics",
    "describe",
    "drop_foreign_states",
]

Policy = Literal["exact", "compatible", "force"]

_ENGINE_POLICIES = {"seed": "locked", "out": "ignored", "plugins": "ignored"}


@dataclass(frozen=True)
class Difference:
    """One difference between this run and the one that wrote the checkpoint.

    Args:
        what: the key, or the plugin, and both values, in words.
        refused_by: the policies under which it is an error.
    """

    what: str
    refused_by: tuple[Policy, ...] = ()


def describe(engine: Engine) -> dict[str, Json]:
    """The content of `lock.json`: versions, and the settings of the engine and each plugin."""
    entries = {
        name: (entry.value.split(".")[0].split(":")[0], entry.dist)
        for name, entry in installed().items()
    }
    givers = {dist for _, dist in entries.values() if dist is not None}
    told = {dist: (dist.name, dist.version) for dist in givers}  # reading the metadata is slow
    plugins: dict[str, Json] = {}
    for name, plugin in engine.plugins.items():
        package, distribution = entries.get(name.partition("@")[0], ("", None))
        ours = type(plugin).__module__.split(".")[0] == package and distribution is not None
        giver, its_version = told[distribution] if ours and distribution else (None, None)
        settings: dict[str, Json] = in_run_folder(plugin.config.model_dump(mode="json"))
        plugins[name] = {
            "class": f"{type(plugin).__module__}.{type(plugin).__qualname__}",
            "distribution": giver,
            "version": its_version,
            "state_version": plugin.state_version,
            "files": {source.file: source.sha256 for source in used(plugin)},
            "config": settings,
            "config_sha256": _hash(settings),
        }
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "engine": {
            **{key: value for key, value in engine.config.items() if key != "plugins"},
            "seed": engine.seed,
            "accumulate": engine.accumulate,
            "cells": engine.cells,
        },
        "plugins": plugins,
    }


def compare(saved: Json, engine: Engine, policy: Policy, whose: str) -> list[str]:
    """Compare a checkpoint's lock with the run that resumes from it.

    Args:
        saved: the content of its `lock.json`.
        engine: the run's engine.
        policy: "exact" rejects other plugins or plugin versions; "compatible" accepts other
            versions, added plugins, and removed plugins without state; "force" accepts anything
            that can be loaded.
        whose: the plugin that the policy is a setting of.

    Returns:
        The accepted differences, in words.

    Raises:
        CheckpointError: the policy rejects a difference; all of them are listed.
    """
    now = describe(engine)
    theirs, ours = _table(saved, "plugins"), _table(now, "plugins")
    differences = [
        *_environment(_table(saved), now),
        *_settings("", *_shared(_table(saved, "engine"), _table(now, "engine")), _ENGINE_POLICIES),
    ]
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours:
            differences.append(Difference(f"plugin '{name}' is not in this run", ("exact",)))
        elif name not in theirs:
            differences.append(Difference(f"plugin '{name}' is new in this run", ("exact",)))
        else:
            differences += _plugin(engine.plugins[name], _table(theirs, name), _table(ours, name))
    differences += _order(
        [n for n in theirs if n in ours], [n for n in ours if n in theirs], engine
    )
    refused = [difference.what for difference in differences if policy in difference.refused_by]
    if refused:
        raise CheckpointError(
            f"the checkpoint was saved by a different run: {'; '.join(refused)}. "
            "Resume it with its own config (nexus-run resume RUN), or accept the difference: ",
            hint_set(f"{whose}.resume_policy", "compatible" if policy == "exact" else "force"),
        )
    return [difference.what for difference in differences]


def compare_data(saved: DataState | None, now: str | None, policy: Policy, whose: str) -> str:
    """Compare the data of a checkpoint with the data that the run continues with.

    Args:
        saved: the snapshot's data state.
        now: the fingerprint of the data, if it has one.
        policy: "exact" rejects different data.
        whose: the plugin that the policy is a setting of.

    Returns:
        The difference, in words; empty if there is no difference or it is unknown.

    Raises:
        CheckpointError: it differs, and the policy rejects that.
    """
    before = saved["fingerprint"] if saved is not None else None
    if before is None or now is None or before == now:
        return ""
    if policy == "exact":
        raise CheckpointError(
            f"the checkpoint's run used different data (fingerprint {before}, now {now}), so "
            "this run would not continue it; use the original data, or start this "
            "data from its first batch: ",
            hint_set(f"{whose}.resume_policy", "compatible"),
        )
    return f"the training data is not that of the checkpoint (fingerprint {now}, was {before})"


def compare_numerics(saved: Json, device: torch.device, policy: Policy, whose: str) -> list[str]:
    """Compare how a checkpoint was computed with how this run computes.

    Args:
        saved: the entry in its `lock.json`; None if an earlier release wrote it.
        device: this run's device.
        policy: "exact" rejects a difference if the checkpoint's run was deterministic.
        whose: the plugin that the policy is a setting of.

    Returns:
        The accepted differences, in words.

    Raises:
        CheckpointError: the policy rejects a difference; all of them are listed.
    """
    theirs = saved if isinstance(saved, dict) else {}
    found = list(differences(theirs, numerics(device)))
    if found and policy == "exact" and theirs.get("deterministic_algorithms"):
        raise CheckpointError(
            f"the checkpoint's run was deterministic, and numerics now differ: "
            f"{'; '.join(found)}. Restore them, or accept different bits: ",
            hint_set(f"{whose}.resume_policy", "compatible"),
        )
    return found


def _order(saved: list[str], now: list[str], engine: Engine) -> Iterator[Difference]:
    """The difference in plugin order, if any; it changes how sums of losses round."""
    acting = [n for n in now if not getattr(engine.plugins[n], "only_watches", False)]
    before = [n for n in saved if n in acting]
    if before != acting:
        here, there = next(pair for pair in zip(acting, before, strict=True) if len({*pair}) > 1)
        yield Difference(f"the plugin order differs: '{here}' instead of '{there}'", ("exact",))


def drop_foreign_states(
    states: dict[str, Any], engine: Engine, policy: Policy, whose: str
) -> list[str]:
    """Drop the states of plugins that are not in this run, if the policy allows it.

    Returns:
        The names of the plugins whose state is lost.

    Raises:
        CheckpointError: a state would be lost and the policy is not "force".
    """
    foreign = [name for name in states if name not in engine.plugins]
    if foreign and policy != "force":
        raise CheckpointError(
            f"the checkpoint has state of {', '.join(foreign)}, not in this run; add it: ",
            hint_add(*foreign),
            ", or drop it: ",
            hint_set(f"{whose}.resume_policy", "force"),
        )
    for name in foreign:
        del states[name]
    return foreign


def _environment(saved: Mapping[str, Json], now: Mapping[str, Json]) -> Iterator[Difference]:
    for name in ("python", "torch"):
        if saved.get(name) != now[name]:
            yield Difference(f"{name} is {now[name]}, was {_short(saved.get(name))}")


def _plugin(
    plugin: Plugin[Any], saved: Mapping[str, Json], now: Mapping[str, Json]
) -> Iterator[Difference]:
    for key in ("distribution", "version", "state_version"):
        if saved.get(key) != now[key]:
            what = f"{key.replace('_', ' ')} of plugin '{plugin.name}'"
            change = f"{what} is {now[key]}, was {_short(saved.get(key))}"
            yield Difference(change, ("exact",))
    yield from _files(plugin, saved, now)
    policies = {}
    for name, field in plugin.config_class.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict):
            policies[name] = str(extra.get("resume", "applied"))
    prefix = f"{plugin.name}."
    yield from _settings(prefix, _table(saved, "config"), _table(now, "config"), policies)


def _files(
    plugin: Plugin[Any], saved: Mapping[str, Json], now: Mapping[str, Json]
) -> Iterator[Difference]:
    """Differences in the user's own code."""
    theirs, ours = (_table(lock.get("files", {})) for lock in (saved, now))
    for file in [*theirs, *(file for file in ours if file not in theirs)]:
        if theirs.get(file) != ours.get(file):
            how = "is gone" if file not in ours else "has changed" if file in theirs else "is new"
            yield Difference(f"the file {file} of plugin '{plugin.name}' {how}", ("exact",))


def _settings(
    prefix: str, saved: Mapping[str, Json], now: Mapping[str, Json], policies: Mapping[str, str]
) -> Iterator[Difference]:
    for key in [*saved, *(key for key in now if key not in saved)]:
        policy = policies.get(key, "applied")
        if saved.get(key) == now.get(key) or policy == "ignored":
            continue
        what = f"{prefix}{key} is {_short(now.get(key))}, was {_short(saved.get(key))}"
        yield Difference(what, ("exact", "compatible") if policy == "locked" else ())


def _shared(
    saved: Mapping[str, Json], now: Mapping[str, Json]
) -> tuple[dict[str, Json], dict[str, Json]]:
    """The keys that both sides have; an embedded engine knows fewer than a config file."""
    keys = [key for key in saved if key in now]
    return {key: saved[key] for key in keys}, {key: now[key] for key in keys}


def _table(value: Json | Mapping[str, Json], *keys: str) -> dict[str, Json]:
    """A nested JSON object."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"lock.json has no {' '.join(keys) or 'object'}")
    return dict(value)


def _short(value: Json) -> str:
    return json.dumps(value)[:80]


def _hash(settings: Json) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
