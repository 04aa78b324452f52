"""Find plugins by entry point, load those that are named, check them and put them in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import EntryPoint, EntryPoints, entry_points, version
from typing import Any, TypeAlias, cast

from nexus_core.errors import PluginError, hint_add, hint_leave_out, suggestion
from nexus_core.events import API_VERSIONS, RENAMED, STAGES, Hooks
from nexus_core.plugin import Plugin

__all__ = [
    "CORE",
    "HOOK_NAMES",
    "Plan",
    "answering",
    "arrange",
    "find",
    "installed",
    "load",
    "scan",
]

CORE = "the core"
NOT_WRAPPED = {
    "on_batch": "return the changed batch instead",
    **dict.fromkeys(
        ("on_step", "on_save", "on_finish", "on_error", "on_close"), "its calls are made one by one"
    ),
}
HOOK_NAMES = tuple(name for name, value in vars(Hooks).items() if hasattr(value, "nexus_spec"))
AnyPlugin: TypeAlias = Plugin[Any]


@dataclass(frozen=True)
class Plan:
    """Plugins in the order in which they are called, and what they declare of one another."""

    plugins: tuple[AnyPlugin, ...]
    declared: Mapping[tuple[str, str], str]  # (earlier, later) to the one that says so


def scan() -> EntryPoints:
    """The entry point of every installed plugin, from metadata alone: nothing is imported."""
    return entry_points(group="nexus.plugins")


def installed() -> dict[str, EntryPoint]:
    """Every installed plugin by name; of two that go by one name, one."""
    return {entry.name: entry for entry in sorted(scan())}


def find(name: str, scanned: EntryPoints) -> EntryPoint:
    """Which of the entry points that `scan` gave is this plugin's.

    Raises:
        PluginError: it is not installed, or two distributions give a plugin of that name.
    """
    found = {entry.value: entry for entry in scanned.select(name=name)}
    if not found:
        known = sorted(scanned.names)
        raise PluginError(
            f"no plugin named '{name}'.{suggestion(name, known)} Installed: "
            f"{', '.join(known) or 'none'}. See: nexus-plugins list; one in a file goes by the "
            "file, such as ./mine.py"
        )
    if len(found) > 1:
        givers = " and ".join(sorted(map(distribution, found.values())))
        raise PluginError(f"two distributions give a plugin '{name}': {givers}; uninstall one")
    return next(iter(found.values()))


def distribution(entry: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"


def load(name: str, scanned: EntryPoints | None = None) -> type[AnyPlugin]:
    """Import one plugin's class; who loads several gives what one `scan` found.

    `sparkle@late` is a further instance of the plugin `sparkle`.

    Raises:
        PluginError: it is not installed once, cannot be imported, is not a plugin of that name,
            was built for another API, or has a method that is not the hook it looks like.
    """
    name, labels, label = name.partition("@")
    entry = find(name, scanned or scan())
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        said = f"{_origin(entry)} cannot be imported: {type(error).__name__}: {error}; repair its "
        raise PluginError(f"{said}distribution, or leave it out: ", hint_leave_out(name)) from error
    if fault := _fault_of(found, name):
        raise PluginError(_origin(entry) + fault)
    plugin = cast(type[AnyPlugin], found)
    return plugin.labelled(label) if labels else plugin


def _origin(entry: EntryPoint) -> str:
    """A plugin in words; its distribution's metadata takes long to read, so for errors alone."""
    return f"plugin '{entry.name}' ({distribution(entry)}, {entry.value})"


def answering(hook: str) -> type[AnyPlugin]:
    """The first installed plugin, by name, that answers a hook and can be loaded.

    Raises:
        PluginError: no installed plugin does.
    """
    scanned = scan()
    for name in sorted(scanned.names):
        try:
            found = load(name, scanned)
        except PluginError:  # not with what it needs: then it is not there
            continue
        marks = getattr(getattr(found, hook, None), "nexus_impl", None)
        if marks and not marks["wrapper"]:
            return found
    raise PluginError(f"no installed plugin answers {hook}; see: nexus-plugins list")


def arrange(plugins: Iterable[AnyPlugin]) -> Plan:
    """Check plugins against one another, and sort them by their constraints, then as given.

    Raises:
        PluginError: a name or slot taken twice, a missing requirement, a conflict, a circle, or
            what `load` says of the class of one.
    """
    given = list(plugins)
    if wrong := [plugin for plugin in given if not isinstance(plugin, Plugin)]:
        raise PluginError(f"a plugin is an object such as MyPlugin(), got {wrong[0]!r}")
    names = [plugin.name for plugin in given]
    for plugin in given:
        if fault := _fault_of(type(plugin), type(plugin).name):
            raise PluginError(f"plugin '{plugin.name}'{fault}")
        if names.count(plugin.name) > 1:
            said = f"plugin '{plugin.name}' is given twice; keep one of them, or label one: "
            raise PluginError(said, hint_add(f"{plugin.name}@late"))
        if missing := {
            need for need in plugin.requires if not any(_among(n, [need]) for n in names)
        }:
            said = f"plugin '{plugin.name}' requires '{min(missing)}', which is not in this run"
            raise PluginError(f"{said}; add it: ", hint_add(min(missing)))
        if enemies := [name for name in names if _among(name, plugin.conflicts)]:
            _refuse_pair(plugin.name, min(enemies), "cannot be in one run")
    owner: dict[str, str] = {}
    for name, claim in _claims(given):
        if owner.setdefault(claim, name) != name:
            _refuse_pair(owner[claim], name, f"both {claim}")
    declared = _declared(given)
    order = _sorted(names, declared)
    return Plan(tuple(sorted(given, key=lambda plugin: order.index(plugin.name))), declared)


def _fault_of(found: object, name: str) -> str:
    """What keeps a class from being a plugin of this name; nothing where it is one."""
    if not (isinstance(found, type) and issubclass(found, Plugin)):
        return f" must be a subclass of nexus_core.Plugin, got {found!r}"
    if found.name != name:
        return f" calls itself '{found.name}'; give both the same name"
    if found.api_version not in API_VERSIONS:
        ours = f"nexus-trainer {version('nexus-trainer')} has {' and '.join(API_VERSIONS)}"
        fix = "install a release of the plugin for that, or the nexus-trainer that it is for"
        return f" is built for plugin API {found.api_version}; {ours}: {fix}"
    faults = ((name, _misuse(getattr(found, name), name)) for name in dir(found))
    return next((f": {found.__qualname__}.{name}{fault}" for name, fault in faults if fault), "")


def _misuse(method: Any, name: str) -> str:
    """What is wrong with a method as a hook; nothing where it is right, or none."""
    marked = getattr(method, "nexus_impl", None)
    if not marked:
        unmarked = " is named like a hook: mark it @hookimpl, or rename it"
        return unmarked if name in HOOK_NAMES else ""
    if name not in HOOK_NAMES:
        known = f"{suggestion(name, HOOK_NAMES)} Hooks: {', '.join(HOOK_NAMES)}"
        unknown = f" is marked @hookimpl, but there is no such hook.{known}"
        return "" if marked["optionalhook"] or name in RENAMED else unknown
    stages = [stage.rstrip("*") for stage in STAGES.get(name, ())]
    stage = getattr(method, "nexus_stage", None)
    if stage is not None and stage not in stages:
        known = f"its stages: {', '.join(stages)}" if stages else "it has no stages"
        return f": there is no stage '{stage}'; {known}"
    if marked["wrapper"] and (why := NOT_WRAPPED.get(RENAMED.get(name, name))):
        return f": {name} cannot be wrapped: {why}"
    return ""


def claim(plan: Plan, engine: object) -> None:
    """Give the plugins to an engine: each belongs to one, as it keeps that engine's state.

    Raises:
        PluginError: one of them belongs to another engine.
    """
    for plugin in plan.plugins:
        if vars(plugin).setdefault("_claimed_by", id(engine)) != id(engine):
            raise PluginError(
                f"plugin '{plugin.name}' is the object of another engine already, and keeps its "
                f"state; make a new one: {type(plugin).__name__}(...)"
            )


def _claims(plugins: Iterable[AnyPlugin]) -> Iterator[tuple[str, str]]:
    """What one plugin of a run alone may do, by the names of those that want to."""
    for plugin in plugins:
        if plugin.slot:
            yield plugin.name, f"fill the slot '{plugin.slot}'"
        for hook in HOOK_NAMES:
            if getattr(getattr(plugin, hook, None), "nexus_impl", {}).get("tryfirst"):
                yield plugin.name, f"ask to be first (declare before or after) in '{hook}'"


def _refuse_pair(one: str, other: str, why: str) -> None:
    raise PluginError(
        f"plugins '{one}' and '{other}' {why}; leave one of them out, such as ", hint_leave_out(one)
    )


def _declared(plugins: Sequence[AnyPlugin]) -> dict[tuple[str, str], str]:
    """(earlier, later) to who declares it, of the plugins that are there."""
    both = [(plugin, other.name) for plugin in plugins for other in plugins]
    pairs = {(p.name, other): p.name for p, other in both if _among(other, p.before)}
    return pairs | {(other, p.name): p.name for p, other in both if _among(other, p.after)}


def _among(name: str, declared: Iterable[str]) -> bool:
    """Whether names that a plugin declares mean this one: `sparkle` means `sparkle@late` too."""
    return not {name, name.partition("@")[0]}.isdisjoint(declared)


def _sorted(names: Sequence[str], declared: Mapping[tuple[str, str], str]) -> list[str]:
    """Topological order that keeps the given order wherever no constraint speaks."""
    before = {name: {first for first, then in declared if then == name} for name in names}
    try:
        TopologicalSorter(before).prepare()
    except CycleError as error:
        pairs = list(zip(error.args[1], error.args[1][1:], strict=False))
        circle = ", ".join(f"'{a}' before '{b}' (as '{declared[a, b]}' says)" for a, b in pairs)
        raise PluginError(
            f"the plugins' order is a circle: {circle}; leave one of them out, such as ",
            hint_leave_out(pairs[0][0]),
        ) from None
    order: list[str] = []
    while len(order) < len(names):
        order.append(next(n for n in names if n not in order and before[n].issubset(order)))
    return order
