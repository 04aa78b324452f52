"""Find plugins by entry point, load the named ones, check and order them."""

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
        ("on_step", "on_save", "on_finish", "on_error", "on_close"), "plugins are called one by one"
    ),
}
HOOK_NAMES = tuple(name for name, value in vars(Hooks).items() if hasattr(value, "nexus_spec"))
AnyPlugin: TypeAlias = Plugin[Any]


@dataclass(frozen=True)
class Plan:
    """Plugins in call order, and the order constraints they declare."""

    plugins: tuple[AnyPlugin, ...]
    declared: Mapping[tuple[str, str], str]  # (earlier, later): the plugin that declares it


def scan() -> EntryPoints:
    """The entry point of every installed plugin, from metadata only: nothing is imported."""
    return entry_points(group="nexus.plugins")


def installed() -> dict[str, EntryPoint]:
    """Every installed plugin by name; one of two that share a name."""
    return {entry.name: entry for entry in sorted(scan())}


def find(name: str, scanned: EntryPoints) -> EntryPoint:
    """The plugin's entry point among those found by `scan`.

    Raises:
        PluginError: it is not installed, or two distributions provide it.
    """
    found = {entry.value: entry for entry in scanned.select(name=name)}
    if not found:
        raise PluginError(
            f"no plugin named '{name}'.{suggestion(name, scanned.names)} All installed: "
            "nexus-plugins list; name one in a file by its path, such as ./mine.py"
        )
    if len(found) > 1:
        raise PluginError(
            f"two distributions provide a plugin '{name}': "
            f"{' and '.join(sorted(map(distribution, found.values())))}; uninstall one"
        )
    return next(iter(found.values()))


def distribution(entry: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"


def load(name: str, scanned: EntryPoints | None = None) -> type[AnyPlugin]:
    """Import one plugin's class; to load several, pass the result of one `scan`.

    `sparkle@late` is another instance of the plugin `sparkle`.

    Raises:
        PluginError: it is not installed exactly once, cannot be imported, has another name,
            was built for another API, or has a method that looks like a hook but is not one.
    """
    name, labels, label = name.partition("@")
    entry = find(name, scanned or scan())
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{_origin(entry)} cannot be imported: {type(error).__name__}: {error}; fix its "
            "distribution, or remove it: ",
            hint_leave_out(name),
        ) from error
    if fault := _fault_of(found, name):
        raise PluginError(_origin(entry) + fault)
    plugin = cast(type[AnyPlugin], found)
    return plugin.labelled(label) if labels else plugin


def _origin(entry: EntryPoint) -> str:
    """A plugin in words; only for errors, as distribution metadata is slow to read."""
    return f"plugin '{entry.name}' ({distribution(entry)}, {entry.value})"


def answering(hook: str) -> type[AnyPlugin]:
    """The first installed plugin, by name, that implements a hook and can be loaded.

    Raises:
        PluginError: no installed plugin does.
    """
    scanned = scan()
    for name in sorted(scanned.names):
        try:
            found = load(name, scanned)
        except PluginError:  # its dependencies are missing, so skip it
            continue
        marks = getattr(getattr(found, hook, None), "nexus_impl", None)
        if marks and not marks["wrapper"]:
            return found
    raise PluginError(f"no installed plugin implements {hook}; see: nexus-plugins list")


def arrange(plugins: Iterable[AnyPlugin]) -> Plan:
    """Check plugins against one another, and sort them by their constraints, then as given.

    Raises:
        PluginError: a name or slot is taken twice, a requirement is missing, or there is a conflict
            or cycle, or an error that `load` would raise for a class.
    """
    given = list(plugins)
    if wrong := [p for p in given if not isinstance(p, Plugin) or "config" not in vars(p)]:
        raise PluginError(
            "plugins must be objects such as MyPlugin(); an __init__ must call super().__init__(): "
            f"got {wrong[0]!r}"
        )
    names = [plugin.name for plugin in given]
    for plugin in given:
        if fault := _fault_of(type(plugin), type(plugin).name):
            raise PluginError(f"plugin '{plugin.name}'{fault}")
        if names.count(plugin.name) > 1:
            raise PluginError(
                f"plugin '{plugin.name}' is listed twice; keep one of them, or label one: ",
                hint_add(f"{plugin.name}@late"),
            )
        if missing := {
            need for need in plugin.requires if not any(_among(n, [need]) for n in names)
        }:
            raise PluginError(
                f"plugin '{plugin.name}' requires '{min(missing)}', which is not in this run; "
                "add it: ",
                hint_add(min(missing)),
            )
        if enemies := [name for name in names if _among(name, plugin.conflicts)]:
            _refuse_pair(plugin.name, min(enemies), "cannot be used together")
    owner: dict[str, str] = {}
    for name, claim in _claims(given):
        if owner.setdefault(claim, name) != name:
            _refuse_pair(owner[claim], name, f"both {claim}")
    declared = _declared(given)
    order = _sorted(names, declared)
    return Plan(tuple(sorted(given, key=lambda plugin: order.index(plugin.name))), declared)


def _fault_of(found: object, name: str) -> str:
    """Why a class is not a plugin of this name; empty if it is one."""
    if not (isinstance(found, type) and issubclass(found, Plugin)):
        return f" must be a subclass of nexus_core.Plugin, got {found!r}"
    if found.name != name:
        return f" has the name '{found.name}'; give both the same name"
    if found.api_version not in API_VERSIONS:
        ours = f"nexus-trainer {version('nexus-trainer')} supports {' and '.join(API_VERSIONS)}"
        fix = "install a matching release of the plugin or of nexus-trainer"
        return f" is built for plugin API {found.api_version}; {ours}: {fix}"
    faults = (
        (name, _misuse(getattr(found, name), name)) for name in dir(found) if name[:2] != "__"
    )
    return next((f": {found.__qualname__}.{name}{fault}" for name, fault in faults if fault), "")


def _misuse(method: Any, name: str) -> str:
    """What is wrong with a method as a hook; empty if nothing."""
    marked = getattr(method, "nexus_impl", None)
    if not marked:
        return (
            " is named like a hook: mark it @hookimpl, or rename it" if name in HOOK_NAMES else ""
        )
    if name not in HOOK_NAMES:
        return "" if marked["optionalhook"] or name in RENAMED else (
            f" is marked @hookimpl, but no such hook exists.{suggestion(name, HOOK_NAMES)} All: "
            "nexus-run --explain"
        )  # fmt: skip
    stages = [stage.rstrip("*") for stage in STAGES.get(name, ())]
    stage = getattr(method, "nexus_stage", None)
    if stage is not None and stage not in stages:
        return f": no stage '{stage}'; its stages: {', '.join(stages) or 'none'}"
    if marked["wrapper"] and (why := NOT_WRAPPED.get(RENAMED.get(name, name))):
        return f": {name} cannot be wrapped: {why}"
    return ""


def claim(plan: Plan, engine: object) -> None:
    """Bind the plugins to an engine; each keeps that engine's state, so it can have only one.

    Raises:
        PluginError: one of them belongs to another engine.
    """
    for plugin in plan.plugins:
        if vars(plugin).setdefault("_claimed_by", id(engine)) != id(engine):
            raise PluginError(
                f"plugin '{plugin.name}' already belongs to another engine and keeps its "
                f"state; create a new one: {type(plugin).__name__}(...)"
            )


def _claims(plugins: Iterable[AnyPlugin]) -> Iterator[tuple[str, str]]:
    """What only one plugin of a run may do, with the plugins that want to."""
    for plugin in plugins:
        if plugin.slot:
            yield plugin.name, f"fill the slot '{plugin.slot}'"
        for hook in HOOK_NAMES:
            if getattr(getattr(plugin, hook, None), "nexus_impl", {}).get("tryfirst"):
                yield plugin.name, f"ask to be first (declare before or after) in '{hook}'"


def _refuse_pair(one: str, other: str, why: str) -> None:
    raise PluginError(
        f"plugins '{one}' and '{other}' {why}; remove one of them, such as ", hint_leave_out(one)
    )


def _declared(plugins: Sequence[AnyPlugin]) -> dict[tuple[str, str], str]:
    """(earlier, later): the declaring plugin, for the plugins present."""
    both = [(plugin, other.name) for plugin in plugins for other in plugins]
    pairs = {(p.name, other): p.name for p, other in both if _among(other, p.before)}
    return pairs | {(other, p.name): p.name for p, other in both if _among(other, p.after)}


def _among(name: str, declared: Iterable[str]) -> bool:
    """Whether declared names include this one: `sparkle` includes `sparkle@late`."""
    return not {name, name.partition("@")[0]}.isdisjoint(declared)


def _sorted(names: Sequence[str], declared: Mapping[tuple[str, str], str]) -> list[str]:
    """Topological order that keeps the given order where no constraint applies."""
    before = {name: {first for first, then in declared if then == name} for name in names}
    try:
        TopologicalSorter(before).prepare()
    except CycleError as error:
        pairs = list(zip(error.args[1], error.args[1][1:], strict=False))
        circle = ", ".join(f"'{a}' before '{b}' (as '{declared[a, b]}' says)" for a, b in pairs)
        raise PluginError(
            f"the plugin order has a cycle: {circle}; remove one of them, for instance ",
            hint_leave_out(pairs[0][0]),
        ) from None
    order: list[str] = []
    while len(order) < len(names):
        order.append(next(n for n in names if n not in order and before[n].issubset(order)))
    return order
