"""The installed plugins in words: a line for each, and everything about one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib.metadata import EntryPoints
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nexus_core.cli.local import giver, plugin_class
from nexus_core.errors import PluginError
from nexus_core.events import Hooks
from nexus_core.plan import HOOK_NAMES, AnyPlugin, distribution, find, load, scan
from nexus_core.plugin import Plugin

__all__ = ["list_plugins", "show_plugin"]

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >="}
RULES = ("before", "after", "requires", "conflicts")
ROLES = {"wrapper": "wraps", "tryfirst": "asks to be first", "trylast": "asks to be last"}


def list_plugins(*, loading: bool = True) -> str:
    """A line for each installed plugin: name, slot, what it does, distribution and version.

    One that is broken says why instead, and does no harm to the others.

    Args:
        loading: import each plugin; False reads metadata alone, and tells where each would be
            imported from instead of what it does.
    """
    scanned, look = scan(), _loaded if loading else _found
    rows = [(name, *look(name, scanned)) for name in sorted(scanned.names)]
    names, slots = (max((len(row[i]) for row in rows), default=0) + 2 for i in (0, 1))
    return "\n".join(f"{name:<{names}}{slot:<{slots}}{what}" for name, slot, what in rows)


def show_plugin(word: str) -> str:
    """What a plugin does, its settings, hooks, place among the others, and state.

    Args:
        word: its name, or its place, such as `./mine.py`.

    Raises:
        PluginError: it cannot be loaded.
    """
    plugin = plugin_class(word)
    name = plugin.name
    facts = {
        "from": giver(plugin, word),
        "built for": f"plugin API {plugin.api_version}",
        "slot": f"{plugin.slot}: one plugin of a run fills it" if plugin.slot else "",
        **{rule: ", ".join(getattr(plugin, rule)) for rule in RULES},
        "state": _state(plugin),
    }
    settings = list(_settings(plugin.config_class))
    return "\n".join(
        [
            f"{name}: {inspect.cleandoc(plugin.__doc__ or '')}",
            *("", *(f"{fact:<11}{said}" for fact, said in facts.items() if said)),
            *("", "settings" if settings else "no settings"),
            *settings,
            *("", "hooks, in the order of a run"),
            *_hooks(plugin),
        ]
    )


def _found(name: str, scanned: EntryPoints) -> tuple[str, str]:
    try:
        entry = find(name, scanned)
    except PluginError as error:
        return "", _broken(error)
    return "", f"{entry.value} ({distribution(entry)})"


def _loaded(name: str, scanned: EntryPoints) -> tuple[str, str]:
    try:
        plugin = load(name, scanned)
    except PluginError as error:
        return "", _broken(error)
    slot = f"[{plugin.slot}]" if plugin.slot else ""
    return slot, f"{_first_line(plugin.__doc__)} ({distribution(find(name, scanned))})"


def _broken(error: PluginError) -> str:
    return click.style(f"BROKEN: {error.on_command_line()}", fg="red")


def _settings(model: type[BaseModel], indent: str = "  ") -> Iterator[str]:
    """Two lines for each field, and below them those of a block of settings within it."""
    for key, field in model.model_fields.items():
        kind = " ".join([_type(field.annotation), *_bounds(field)])
        yield f"{indent}{key}: {kind}, {_default(field)}"
        yield f"{indent}    {field.description or 'no description'}"
        for block in _blocks(field.annotation):
            yield f"{indent}    {block.__name__}"
            yield from _settings(block, indent + "      ")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return f"default {json.dumps(value, default=str)}"


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _blocks(argument)


def _hooks(plugin: type[AnyPlugin]) -> Iterator[str]:
    for hook in HOOK_NAMES:
        method = getattr(plugin, hook, None)
        if method is not None:
            roles = [said for role, said in ROLES.items() if method.nexus_impl[role]]
            doc = _first_line(method.__doc__ or getattr(Hooks, hook).__doc__)
            yield f"  {hook:<16} {doc}" + "".join(f" [{role}]" for role in roles)


def _state(plugin: type[AnyPlugin]) -> str:
    if plugin.state_dict is Plugin.state_dict:
        return "none to save"
    holds = _first_line(plugin.state_dict.__doc__)
    return f"version {plugin.state_version}" + (f": {holds}" if holds else "")


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _bounds(field: FieldInfo) -> Iterator[str]:
    for rule in field.metadata:
        for name, sign in BOUNDS.items():
            if (value := getattr(rule, name, None)) is not None:
                yield f"{sign} {value}"


def _type(annotation: Any) -> str:
    """A type as one writes it: `float`, `Interval | None`, `'min' | 'max'`, `list[str]`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is not None:
        return f"{_type(origin)}[{', '.join(map(_type, arguments))}]"
    if annotation in (None, NoneType, ...):
        return "..." if annotation is ... else "null"
    return getattr(annotation, "__name__", str(annotation))
