"""Recorded differences of two runs: settings, code, versions, data, environment."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nexus_core.cli.lineage import changes
from nexus_core.cli.recorded import config_of, settings_in
from nexus_core.errors import PluginError
from nexus_core.places import used
from nexus_core.plan import load
from nexus_plugins.tape import parts
from nexus_plugins.tape.again import Recorded

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Fact", "facts", "near", "since"]

HOOKS: Mapping[str, tuple[str, ...]] = {
    "batch": ("make_data", "on_batch", "cut_batch"),
    "generators": ("make_data", "on_batch", "make_model"),
    "start": ("make_model", "make_optimizer", "on_build", "on_start"),
    "forward": ("make_model", "forward", "make_data", "loss_terms"),
    "loss": ("loss_terms", "loss_units", "loss_weight", "weigh_losses"),
    "backward": ("backward", "loss_terms", "loss_weight", "weigh_losses", "make_model"),
    "gradient": ("after_backward", "backward"),
    "settings": ("make_optimizer", "lr_scale", "on_build", "on_start"),
    "update": ("optimizer_step", "on_step", "make_optimizer"),
    "end": ("on_step", "on_step_end", "on_log", "on_eval"),
}
"""The hooks by which a plugin takes part in each phase of a step."""

ROUNDING = ("forward", "loss", "backward", "gradient", "update")
"""Phases in which the machine and the number of threads affect rounding."""


@dataclass(frozen=True)
class Fact:
    """A recorded difference between two runs.

    Args:
        kind: "setting", "order", "code", "version", "data" or "environment".
        key: what differs: `optim_adamw.lr`, `threads`, ...
        values: in both runs.
    """

    kind: str
    key: str
    values: tuple[Any, Any]

    def __str__(self) -> str:
        one, other = (_short(value) for value in self.values)
        return f"{self.kind} {self.key}: {one} | {other}"


def facts(one: Recorded, other: Recorded) -> list[Fact]:
    """All differences in config, code, versions, data and environment."""
    configs = [settings_in(config_of(run.folder)) for run in (one, other)]
    found = [Fact("setting", key, pair) for key, pair in changes(*configs).items()]
    found += _order(*(list(config.get("plugins") or {}) for config in configs))
    found += _locks(one.lock(), other.lock())
    data = one.data(), other.data()
    if None not in data and data[0] != data[1]:
        found.append(Fact("data", "fingerprint", data))
    return [*found, *_environments(one, other)]


def since(run: Recorded, engine: Engine) -> list[Fact]:
    """What has changed since a run was made: code, versions and environment.

    Args:
        run: the recorded run.
        engine: engine of the re-execution, after its last step.
    """
    then = run.lock()
    known = {name: of for name, of in (then.get("plugins") or {}).items() if name in engine.plugins}
    now = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "plugins": {
            name: of | {"files": {s.file: s.sha256 for s in used(engine.plugins[name])}}
            for name, of in known.items()
        },
    }
    surroundings = run.tape.environment(engine.state.step), parts.environment(engine)
    return [*_locks(then, now), *_surroundings(*surroundings)]


def near(found: list[Fact], phase: str, plugin: str = "") -> list[Fact]:
    """The differences that may explain one in a phase of a step, likeliest first.

    Args:
        found: all differences.
        phase: phase of the step.
        plugin: a plugin known to take part in it.
    """
    kinds = {"code", "order"} | ({"environment", "version"} if phase in ROUNDING else set())
    kinds |= {"data"} if phase == "batch" else set()
    named = [f for f in found if plugin and f.key.partition(".")[0] == plugin]
    acting = [f for f in found if f.kind == "setting" and _acts(f.key, phase)]
    rest = [f for f in found if f.kind in kinds]
    return list(dict.fromkeys([*named, *acting, *rest]))


def _acts(key: str, phase: str) -> bool:
    """Whether a setting belongs to a plugin that takes part, or may take part, in a phase."""
    plugin, dot, _ = key.partition(".")
    if not dot or ".py" in key:  # the engine's own, or of a local file
        return True
    try:
        found = load(plugin)
    except PluginError:
        return True
    return any(getattr(getattr(found, h, None), "nexus_impl", None) for h in HOOKS[phase])


def _order(one: list[str], other: list[str]) -> Iterator[Fact]:
    mine = [name for name in one if name in other]
    theirs = [name for name in other if name in one]
    if mine != theirs:
        pair = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
        yield Fact("order", "of the plugins", pair)


def _locks(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Fact]:
    for name in ("python", "torch"):
        if one and other and one.get(name) != other.get(name):
            yield Fact("version", name, (one.get(name), other.get(name)))
    mine, theirs = one.get("plugins") or {}, other.get("plugins") or {}
    for name in [name for name in mine if name in theirs]:
        pair = mine[name].get("version"), theirs[name].get("version")
        if pair[0] != pair[1]:
            yield Fact("version", name, pair)
        files = mine[name].get("files") or {}, theirs[name].get("files") or {}
        for file in sorted(files[0].keys() | files[1].keys()):
            hashes = files[0].get(file), files[1].get(file)
            if hashes[0] != hashes[1]:
                yield Fact("code", f"{name}.{file}", hashes)


def _environments(one: Recorded, other: Recorded) -> Iterator[Fact]:
    yield from _surroundings(
        *(run.tape.environment(max(run.tape.lines, default=0)) for run in (one, other))
    )


def _surroundings(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Fact]:
    for key in first.keys() & second.keys() if first and second else ():
        if first[key] != second[key]:
            yield Fact("environment", key, (first[key], second[key]))


def _short(value: object) -> str:
    return "none" if value is None else f"{value!s:.60}"
