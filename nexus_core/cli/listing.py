"""Show the installed plugins: one line each, or everything about one."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import EntryPoints
from itertools import groupby

import click

from nexus_core.cli.groups import GROUPS, group_of
from nexus_core.cli.local import giver, plugin_class
from nexus_core.cli.schema import block_schema
from nexus_core.cli.tables import folded
from nexus_core.errors import ConfigError, PluginError
from nexus_core.events import Hooks
from nexus_core.plan import HOOK_NAMES, AnyPlugin, distribution, find, load, scan
from nexus_core.plugin import Plugin
from nexus_core.signatures import own_doc, settings_lines

__all__ = [
    "Listed",
    "list_plugins",
    "list_plugins_json",
    "listed_plugins",
    "show_plugin",
    "show_plugin_json",
]

RULES = ("before", "after", "requires", "conflicts")
_OWN = "nexus-trainer"  # not shown
_INSTALL = re.compile(r"pip install .*")
ROLES = {"wrapper": "wraps", "tryfirst": "asks to be first", "trylast": "asks to be last"}


@dataclass(frozen=True)
class Listed:
    """A row of the list of plugins.

    Args:
        name: name of the plugin.
        package: distribution and version; empty if two provide it.
        status: "ready", "missing" (it needs a package that is not installed) or "broken".
        what: what it does, or why it is not available.
        group: its purpose; empty if it is not loaded.
        slot: the slot it fills.
    """

    name: str
    package: str
    status: str
    what: str
    group: str = ""
    slot: str = ""


def listed_plugins(*, loading: bool = True) -> list[Listed]:
    """Every installed plugin, by group and name; a broken one does not affect the others.

    Args:
        loading: import each plugin; False only reads metadata, and shows where each would be
            imported from instead of what it does.
    """
    scanned = scan()
    look = _loaded if loading else _found
    rows = [look(name, scanned) for name in sorted(scanned.names)]
    return sorted(rows, key=lambda row: GROUPS.index(row.group) if row.group else len(GROUPS))


def list_plugins(*, loading: bool = True) -> str:
    """One line for each installed plugin, under its group's heading; see `listed_plugins`."""
    rows = listed_plugins(loading=loading)
    width = max((len(row.name) for row in rows), default=0) + 2
    lines = list[str]()
    for group, members in groupby(rows, key=lambda row: row.group):
        heading = group or ("not ready" if loading else "")
        if heading:
            lines += ["", click.style(heading, bold=True)]
        lines += [f"{row.name:<{width}}{_said(row, width)}" for row in members]
    return "\n".join(lines).lstrip("\n")


def list_plugins_json(*, loading: bool = True) -> str:
    """The same as JSON."""
    return json.dumps([asdict(row) for row in listed_plugins(loading=loading)], indent=2)


def _said(row: Listed, indent: int) -> str:
    if row.status == "missing":
        return click.style(folded(f"not installed: {row.what}", indent), fg="yellow")
    if row.status == "broken":
        return click.style(folded(f"BROKEN: {row.what}", indent), fg="red")
    own = row.package.startswith(f"{_OWN} ")
    return folded(row.what if own else f"{row.what} ({row.package})", indent)


def show_plugin_json(word: str) -> str:
    """The same as `show_plugin` in JSON; settings as a JSON schema.

    Raises:
        PluginError: it cannot be loaded.
    """
    plugin = plugin_class(word)
    hooks = [hook for hook in HOOK_NAMES if hasattr(plugin, hook)]
    facts = {
        "name": plugin.name,
        "what": inspect.cleandoc(own_doc(plugin)),
        "from": giver(plugin, word),
        "api_version": plugin.api_version,
        "group": group_of(plugin),
        "slot": plugin.slot,
        **{rule: list(getattr(plugin, rule)) for rule in RULES},
        "has_state": plugin.state_dict is not Plugin.state_dict,
        "hooks": hooks,
        "settings": block_schema(plugin.config_class),
    }
    return json.dumps(facts, indent=2, default=str)


def show_plugin(word: str) -> str:
    """What a plugin does, its settings, hooks, order and state.

    Args:
        word: its name or its path, such as `./mine.py`.

    Raises:
        PluginError: it cannot be loaded.
    """
    plugin = plugin_class(word)
    name = plugin.name
    facts = {
        "from": giver(plugin, word),
        "built for": f"plugin API {plugin.api_version}",
        "slot": f"{plugin.slot}: only one plugin of a run can fill it" if plugin.slot else "",
        **{rule: ", ".join(getattr(plugin, rule)) for rule in RULES},
        "state": _state(plugin),
    }
    settings = [_indented(line) for line in settings_lines(plugin.config_class)]
    return "\n".join(
        [
            folded(_paragraphs(f"{name}: {inspect.cleandoc(own_doc(plugin))}")),
            *("", *(f"{fact:<11}{folded(said, 11)}" for fact, said in facts.items() if said)),
            *("", "settings" if settings else "no settings"),
            *settings,
            *("", "hooks, in call order"),
            *_hooks(plugin),
        ]
    )


def _found(name: str, scanned: EntryPoints) -> Listed:
    try:
        entry = find(name, scanned)
    except PluginError as error:
        return Listed(name, "", "broken", error.on_command_line())
    return Listed(name, distribution(entry), "ready", entry.value)


def _loaded(name: str, scanned: EntryPoints) -> Listed:
    found = _found(name, scanned)
    if found.status != "ready":
        return found
    try:
        plugin = load(name, scanned)
    except PluginError as error:
        command = _INSTALL.search(str(error.__cause__))
        if isinstance(error.__cause__, ConfigError) and command is not None:
            return replace(found, status="missing", what=command[0])
        return replace(found, status="broken", what=error.on_command_line())
    what = _first_line(own_doc(plugin))
    return replace(found, what=what, group=group_of(plugin), slot=plugin.slot or "")


def _indented(line: str) -> str:
    """The line, wrapped with its own indent."""
    indent = len(line) - len(line.lstrip())
    return line[:indent] + folded(line.lstrip(), indent)


def _paragraphs(doc: str) -> str:
    """The text with each paragraph on one line; lists and code are unchanged."""
    return re.sub(r"(?<=\S)\n(?=[^\s*+|-])", " ", doc) if sys.stdout.isatty() else doc


def _hooks(plugin: type[AnyPlugin]) -> Iterator[str]:
    for hook in HOOK_NAMES:
        method = getattr(plugin, hook, None)
        if method is not None:
            roles = [said for role, said in ROLES.items() if method.nexus_impl[role]]
            doc = _first_line(method.__doc__ or getattr(Hooks, hook).__doc__)
            said = doc + "".join(f" [{role}]" for role in roles)
            yield f"  {hook:<16} {folded(said, 19)}"


def _state(plugin: type[AnyPlugin]) -> str:
    if plugin.state_dict is Plugin.state_dict:
        return "nothing to save"
    holds = _first_line(plugin.state_dict.__doc__)
    return f"version {plugin.state_version}" + (f": {holds}" if holds else "")


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]
