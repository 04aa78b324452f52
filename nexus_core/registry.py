"""Find plugins by entry point, load those that are named, check them and put them in order."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace
from typing import Any, TypeAlias

import pluggy

from nexus_core.errors import PluginError, suggestion
from nexus_core.events import Hooks
from nexus_core.plugin import Plugin

__all__ = ["HOOK_NAMES", "Plan", "arrange", "installed", "load"]

HOOK_NAMES = tuple(name for name, value in vars(Hooks).items() if hasattr(value, "nexus_spec"))
AnyPlugin: TypeAlias = Plugin[Any]


@dataclass(frozen=True)
class Plan:
    """Plugins in the order in which they are called, and why each stands where it stands."""

    plugins: tuple[AnyPlugin, ...]
    reasons: Mapping[str, str]


def installed() -> dict[str, EntryPoint]:
    """Every installed plugin by name, from metadata alone: nothing is imported.

    Raises:
        PluginError: two distributions give a plugin the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group="nexus.plugins"), key=lambda entry: entry.name):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise PluginError(
                f"two distributions give a plugin '{entry.name}': {distribution(other)} and "
                f"{distribution(entry)}; uninstall one of them"
            )
    return found


def distribution(entry: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"


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
        reason = f"{type(error).__name__}: {error}"
        mend = f"repair its distribution, or leave it out: --plugins no:{name}"
        raise PluginError(f"{where} cannot be imported: {reason}; {mend}") from error
    if not (inspect.isclass(found) and issubclass(found, Plugin)):
        raise PluginError(f"{where} must be a subclass of nexus_core.Plugin, got {found!r}")
    if found.name != name:
        raise PluginError(f"{where} calls itself '{found.name}'; give both the same name")
    return found


def arrange(plugins: Iterable[AnyPlugin]) -> Plan:
    """Check plugins against one another, and sort them by their constraints, then as given.

    Raises:
        PluginError: a name or slot taken twice, a missing requirement, a conflict, a circle, or
            a method that is not the hook it looks like.
    """
    given = list(plugins)
    names = [plugin.name for plugin in given]
    for plugin in given:
        _check_hooks(type(plugin))
        if names.count(plugin.name) > 1:
            raise PluginError(f"plugin '{plugin.name}' is given twice; keep one of them")
        if missing := set(plugin.requires) - set(names):
            needed = min(missing)
            raise PluginError(
                f"plugin '{plugin.name}' requires '{needed}', which is not in this run; "
                f"add it with --plugins {needed}"
            )
        if enemies := set(plugin.conflicts) & set(names):
            _refuse_pair(plugin.name, min(enemies), "cannot be in one run")
    _check_unique({plugin.name: plugin.slot for plugin in given if plugin.slot}, "fill the slot")
    for hook in HOOK_NAMES:
        first = {p.name: hook for p in given if _options(p, hook).get("tryfirst")}
        _check_unique(first, "ask to be first (declare before or after instead) in")
    edges = _edges(given)
    reasons = {
        name: "; ".join(why for (_, later), why in edges.items() if later == name) or "as named"
        for name in names
    }
    order = _sorted(names, edges)
    return Plan(tuple(sorted(given, key=lambda plugin: order.index(plugin.name))), reasons)


def shortcuts(hooks: pluggy.HookRelay) -> SimpleNamespace:
    """Every hook by name, quick enough to be called many times a step."""
    return SimpleNamespace(**{name: _shortcut(getattr(hooks, name)) for name in HOOK_NAMES})


def _shortcut(hook: pluggy.HookCaller) -> Callable[..., Any]:
    """The hook itself where a wrapper is around it, else a plain loop with the same answers."""
    impls = hook.get_hookimpls()
    if hook.spec is None or any(impl.wrapper or impl.hookwrapper for impl in impls):
        return hook
    calls = [(impl.function, impl.argnames) for impl in reversed(impls)]

    def first(**given: object) -> Any:
        for function, names in calls:
            if (answer := function(*[given[name] for name in names])) is not None:
                return answer
        return None

    def every(**given: object) -> list[Any]:
        answers = [function(*[given[name] for name in names]) for function, names in calls]
        return [answer for answer in answers if answer is not None]

    return first if hook.spec.opts["firstresult"] else every


def plugin_manager(plan: Plan, defaults: object) -> pluggy.PluginManager:
    """A manager of this engine's own that calls the plugins in the order of the plan."""
    manager = pluggy.PluginManager("nexus")
    manager.add_hookspecs(Hooks)
    manager.register(defaults, name="the core")
    for plugin in reversed(plan.plugins):  # pluggy calls what was registered last first
        try:
            manager.register(plugin, name=plugin.name)
        except pluggy.PluginValidationError as error:
            said = " ".join(str(error).split())
            raise PluginError(f"plugin '{plugin.name}' answers a hook wrongly: {said}") from error
    return manager


def blame(error: Exception, plan: Plan, step: int) -> None:
    """Note on an error which plugin raised it, in which method, at which step."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for plugin in plan.plugins:
            if frame.f_locals.get("self") is plugin:
                error.add_note(f"plugin '{plugin.name}', {frame.f_code.co_name}, step {step}")
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


def _check_hooks(plugin: type[AnyPlugin]) -> None:
    for name in dir(plugin):
        marked = hasattr(getattr(plugin, name), "nexus_impl")
        where = f"{plugin.__module__}.{plugin.__qualname__}.{name}"
        if name in HOOK_NAMES and not marked:
            raise PluginError(f"{where} is named like a hook: mark it @hookimpl, or rename it")
        if marked and name not in HOOK_NAMES:
            known = f"{suggestion(name, HOOK_NAMES)} Hooks: {', '.join(HOOK_NAMES)}"
            raise PluginError(f"{where} is marked @hookimpl, but there is no such hook.{known}")


def _options(plugin: AnyPlugin, hook: str) -> Mapping[str, object]:
    return getattr(getattr(plugin, hook, None), "nexus_impl", {})


def _check_unique(claims: Mapping[str, str], what: str) -> None:
    """Refuse two plugins that claim the same place."""
    owner: dict[str, str] = {}
    for name, place in claims.items():
        if owner.setdefault(place, name) != name:
            _refuse_pair(owner[place], name, f"both {what} '{place}'")


def _refuse_pair(one: str, other: str, why: str) -> None:
    mend = f"leave one out, for instance with --plugins no:{one}"
    raise PluginError(f"plugins '{one}' and '{other}' {why}; {mend}")


def _edges(plugins: Sequence[AnyPlugin]) -> dict[tuple[str, str], str]:
    """(earlier, later) to who asked for it."""
    edges = {}
    for plugin in plugins:
        for other in plugins:
            if other.name in plugin.after:
                edges[other.name, plugin.name] = f"after {other.name}, as it declares"
            if other.name in plugin.before:
                edges[plugin.name, other.name] = f"after {plugin.name}, as {plugin.name} declares"
    return edges


def _sorted(names: Sequence[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Topological order that keeps the given order wherever no constraint speaks."""
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(names, ()))
    for earlier, later in edges:
        sorter.add(later, earlier)
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " before ".join(error.args[1])
        raise PluginError(f"the plugins' order is a circle: {circle}; leave one out") from None
    ready: set[str] = set()
    order: list[str] = []
    while sorter.is_active():
        ready.update(sorter.get_ready())
        order.append(min(ready, key=names.index))
        ready.remove(order[-1])
        sorter.done(order[-1])
    return order
