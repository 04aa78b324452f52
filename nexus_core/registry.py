"""Find plugins by entry point, load those that are named, check them and put them in order."""

from __future__ import annotations

import heapq
import inspect
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from nexus_core.errors import PluginError, suggestion
from nexus_core.events import Hooks
from nexus_core.plugin import Plugin

__all__ = ["HOOKS", "Plan", "arrange", "installed", "keep_named_of_slot", "load", "plugin_manager"]

GROUP = "nexus.plugins"
HOOKS: frozenset[str] = frozenset(
    name for name, value in vars(Hooks).items() if hasattr(value, "nexus_spec")
)

AnyPlugin = Plugin[Any]


@dataclass(frozen=True)
class Plan:
    """Plugins in the order in which they are called, with the reasons.

    Args:
        plugins: in call order.
        reasons: plugin name to why it stands where it stands.
    """

    plugins: tuple[AnyPlugin, ...]
    reasons: Mapping[str, str]


def installed() -> dict[str, EntryPoint]:
    """Every installed plugin by name, from metadata alone: nothing is imported.

    Raises:
        PluginError: two distributions give a plugin the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise PluginError(
                f"two distributions give a plugin '{entry.name}': {distribution(other)} and "
                f"{distribution(entry)}; uninstall one of them"
            )
    return dict(sorted(found.items()))


def distribution(entry: EntryPoint) -> str:
    """The name and version of the distribution that an entry point belongs to."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def load(name: str) -> type[AnyPlugin]:
    """Import one plugin's class.

    Raises:
        PluginError: it is not installed, cannot be imported, or is not a plugin of that name.
    """
    plugins = installed()
    if name not in plugins:
        raise PluginError(
            f"no plugin named '{name}'.{suggestion(name, plugins)} "
            f"Installed: {', '.join(plugins) or 'none'}. See: nexus-plugins list"
        )
    entry = plugins[name]
    where = f"plugin '{name}' ({distribution(entry)}, {entry.value})"
    try:
        found = entry.load()
    except Exception as error:
        raise PluginError(
            f"{where} cannot be imported: {type(error).__name__}: {error}; "
            f"reinstall or repair its distribution, or leave it out with --plugins no:{name}"
        ) from error
    if not (inspect.isclass(found) and issubclass(found, Plugin)):
        raise PluginError(f"{where} is not a subclass of nexus_core.Plugin but {found!r}")
    if found.name != name:
        raise PluginError(
            f"{where} calls itself '{found.name}'; entry point and class must agree: rename "
            f'one of them, or set `name = "{name}"` in the class'
        )
    return found


def keep_named_of_slot(
    defaults: Sequence[str], named: Sequence[str], classes: Mapping[str, type[AnyPlugin]]
) -> list[str]:
    """Drop a preset's default from a slot that the user named another plugin for.

    Args:
        defaults: plugins of the preset, in order.
        named: plugins that the user named, in order.
        classes: the class of each of them.

    Returns:
        The plugins of the run: what is left of the defaults, then the named ones.
    """
    taken = {classes[name].slot for name in named} - {None}
    kept = [name for name in defaults if name in named or classes[name].slot not in taken]
    return [*kept, *(name for name in named if name not in kept)]


def arrange(plugins: Iterable[AnyPlugin]) -> Plan:
    """Check plugins against one another and sort them by their constraints, then as named.

    Raises:
        PluginError: a name twice, a shared slot, a missing requirement, a conflict, a cycle, or
            a method that is not the hook it looks like.
    """
    given = list(plugins)
    by_name: dict[str, AnyPlugin] = {}
    for plugin in given:
        check_hooks(type(plugin))
        if by_name.setdefault(plugin.name, plugin) is not plugin:
            raise PluginError(f"plugin '{plugin.name}' is given twice; keep one of them")
    _check_slots(given)
    _check_company(given, by_name)
    _check_tryfirst(given)
    edges = _edges(given, by_name)
    order = _sorted([plugin.name for plugin in given], edges)
    reasons = {
        name: "; ".join(why for (_, later), why in edges.items() if later == name) or "as named"
        for name in by_name
    }
    return Plan(tuple(by_name[name] for name in order), reasons)


def check_hooks(plugin: type[AnyPlugin]) -> None:
    """Refuse a hook method without `@hookimpl`, and an `@hookimpl` that answers no hook."""
    for attribute in dir(plugin):
        marked = hasattr(getattr(plugin, attribute), "nexus_impl")
        where = f"{plugin.__module__}.{plugin.__qualname__}.{attribute}"
        if attribute in HOOKS and not marked:
            raise PluginError(
                f"{where} is named like a hook but would never be called; "
                "mark it with @hookimpl, or rename it"
            )
        if marked and attribute not in HOOKS:
            raise PluginError(
                f"{where} is marked with @hookimpl but there is no hook '{attribute}'."
                f"{suggestion(attribute, HOOKS)} Hooks: {', '.join(sorted(HOOKS))}"
            )


def plugin_manager(plan: Plan, defaults: object) -> pluggy.PluginManager:
    """A manager of this engine's own that calls the plugins in the order of the plan."""
    manager = pluggy.PluginManager("nexus")
    manager.add_hookspecs(Hooks)
    manager.register(defaults, name="the core")
    for plugin in reversed(plan.plugins):  # pluggy calls what was registered last first
        try:
            manager.register(plugin, name=plugin.name)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin '{plugin.name}': {error}") from error
    return manager


def blame(error: Exception, plan: Plan, step: int) -> None:
    """Note on an error which plugin raised it, in which method, at which step."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        for plugin in plan.plugins:
            if owner is plugin:
                where = f"plugin '{plugin.name}' in {frame.f_code.co_name}, at step {step}"
                error.add_note(f"raised by {where}")
                return


def call_in_reverse(hook: pluggy.HookCaller, **arguments: object) -> None:
    """Call every implementation, last in the plan first, even if one raises; raise at the end."""
    errors = []
    for impl in hook.get_hookimpls():
        try:
            impl.function(*(arguments[name] for name in impl.argnames))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else ExceptionGroup("while closing", errors)


def _check_slots(plugins: Sequence[AnyPlugin]) -> None:
    holders: dict[str, str] = {}
    for plugin in plugins:
        if plugin.slot is None:
            continue
        other = holders.setdefault(plugin.slot, plugin.name)
        if other != plugin.name:
            raise PluginError(
                f"plugins '{other}' and '{plugin.name}' both fill the slot '{plugin.slot}', and "
                f"a run has one; leave one out, for instance with --plugins no:{other}"
            )


def _check_company(plugins: Sequence[AnyPlugin], by_name: Mapping[str, AnyPlugin]) -> None:
    for plugin in plugins:
        for needed in plugin.requires:
            if needed not in by_name:
                raise PluginError(
                    f"plugin '{plugin.name}' requires '{needed}', which is not in this run; "
                    f"add it with --plugins {needed}"
                )
        for enemy in plugin.conflicts:
            if enemy in by_name:
                raise PluginError(
                    f"plugins '{plugin.name}' and '{enemy}' cannot be in one run; "
                    f"leave one out, for instance with --plugins no:{enemy}"
                )


def _check_tryfirst(plugins: Sequence[AnyPlugin]) -> None:
    claims: dict[str, str] = {}
    for plugin in plugins:
        for hook in HOOKS:
            options = getattr(getattr(plugin, hook, None), "nexus_impl", None)
            if (
                options
                and options["tryfirst"]
                and claims.setdefault(hook, plugin.name) != (plugin.name)
            ):
                raise PluginError(
                    f"plugins '{claims[hook]}' and '{plugin.name}' both ask to be first in "
                    f"'{hook}'; declare before = (...) or after = (...) in one of them instead"
                )


def _edges(
    plugins: Sequence[AnyPlugin], by_name: Mapping[str, AnyPlugin]
) -> dict[tuple[str, str], str]:
    """(earlier, later) to who asked for it."""
    edges = {}
    for plugin in plugins:
        for other in plugin.after:
            if other in by_name:
                edges[other, plugin.name] = f"after {other}, as {plugin.name} declares"
        for other in plugin.before:
            if other in by_name:
                edges[plugin.name, other] = f"after {plugin.name}, as {plugin.name} declares"
    return edges


def _sorted(names: Sequence[str], edges: Mapping[tuple[str, str], str]) -> list[str]:
    """Topological order that keeps the given order wherever no constraint speaks."""
    place = {name: index for index, name in enumerate(names)}
    waiting = {name: sum(later == name for _, later in edges) for name in names}
    ready = [place[name] for name in names if not waiting[name]]
    order: list[str] = []
    while ready:
        name = names[heapq.heappop(ready)]
        order.append(name)
        for earlier, later in edges:
            if earlier == name:
                waiting[later] -= 1
                if not waiting[later]:
                    heapq.heappush(ready, place[later])
    if len(order) < len(names):
        rest = set(names) - set(order)
        said = [f"{b} {why}" for (a, b), why in edges.items() if a in rest and b in rest]
        raise PluginError(
            f"the order of the plugins {', '.join(sorted(rest))} is a circle: {'; '.join(said)}; "
            "leave one of them out"
        )
    return order
