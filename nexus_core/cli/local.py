"""Plugins given by path or module: `./mine.py`, `./mine.py:SparklePlugin`, `pack.module`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from nexus_core.cli.yaml12 import Document
from nexus_core.errors import ConfigError, PluginError
from nexus_core.places import absolute, in_settings, load, shown, split
from nexus_core.plan import AnyPlugin, distribution, installed
from nexus_core.plan import load as load_installed
from nexus_core.plugin import Plugin, name_of
from nexus_core.sources import forget, look_in

__all__ = [
    "LocalPlugins",
    "giver",
    "is_place",
    "place_of",
    "placed",
    "plugin_class",
    "point_to_file",
    "without_label",
]


def is_place(word: str) -> bool:
    """Whether a word gives a plugin by path or module; plugin names lack these signs."""
    return any(sign in word for sign in "./:")


def without_label(word: str) -> tuple[str, str]:
    """A path, and its suffix: `@late` names another instance of the plugin."""
    place, sign, label = word.rpartition("@")
    return (place, sign + label) if is_place(place) and not is_place(label) else (word, "")


class LocalPlugins:
    """The plugins of a run that are given by path or module.

    Args:
        words: names and paths from the command line.
        anew: whether to unload the local code that this process has loaded before.

    Attributes:
        places: the path of each, by plugin name.
        names: all plugins that the command line names.
    """

    def __init__(self, words: Iterable[str], *, anew: bool = True) -> None:
        if anew:
            forget()
        self.places: dict[str, str] = {}
        self.names: list[str] = []
        for word in words:
            self.names.append(self._name(word, Path.cwd(), ()))

    def by_name(self, document: Document, base: Path | None) -> Document:
        """A config file with plugins by name, and its paths made absolute.

        If the command line gives a plugin by path too, its path wins.

        Args:
            document: the file.
            base: what paths in it are relative to; None: the user did not name the file.

        Raises:
            ConfigError: two blocks configure one plugin.
            PluginError: there is no plugin at a path.
        """
        blocks = document.value.get("plugins")
        if not isinstance(blocks, dict):
            return document
        given = frozenset(self.places)
        names: dict[str, str] = {}
        for word in blocks:
            name = self._name(word, base, given)
            if name in names.values():
                raise ConfigError(f"plugins: '{word}' is the plugin '{name}' again; keep one")
            names[word] = name
        named = {names[word]: placed(blocks[word], base) for word in blocks}
        written = {
            ("plugins", names[str(place[1])], *place[2:])
            if place[1:] and place[0] == "plugins"
            else place: text
            for place, text in document.written.items()
        }
        return Document({**document.value, "plugins": named}, written)

    def _name(self, word: str, base: Path | None, given: Collection[str]) -> str:
        if not is_place(word):
            return word
        word, label = without_label(word)
        if (name := name_of(split(word)[1]) + label) in given:
            return name
        place = (_looked_for(word, base) if base else absolute(word)) + label
        found = plugin_class(place)
        if found.name not in given:
            self._add(found.name, place_of(found, place))
        return found.name

    def _add(self, name: str, place: str) -> None:
        if self.places.setdefault(name, place) != place:
            raise PluginError(
                f"'{shown(self.places[name])}' and '{shown(place)}' are both the plugin '{name}'; "
                "keep one, or rename the class of the other"
            )


def placed(value: Any, base: Path | None) -> Any:
    """The same settings with their paths made absolute.

    Args:
        value: a setting, or settings by key.
        base: the folder that paths are relative to; None leaves them unchanged.
    """
    if isinstance(value, dict):
        return {placed(key, base): placed(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, base) for item in value]
    return _looked_for(value, base) if base and in_settings(value) else value


def plugin_class(word: str) -> type[AnyPlugin]:
    """The class of a plugin given by name or path.

    Raises:
        PluginError: it is not a plugin, or has the name of an installed one.
        ConfigError: it cannot be loaded.
    """
    if not is_place(word):
        point_to_file(word, installed())
        return load_installed(word)
    word, label = without_label(word)
    thing = load(_looked_for(word, Path.cwd()))
    found = _only_plugin(thing, word) if isinstance(thing, ModuleType) else thing
    if not (isinstance(found, type) and issubclass(found, Plugin)):
        raise PluginError(f"'{shown(word)}' must be a subclass of nexus_core.Plugin, got {found!r}")
    entry = installed().get(found.name)
    if entry is not None and load_installed(found.name) is not found:
        raise PluginError(
            f"'{shown(word)}' has the name '{found.name}', like a plugin of "
            f"{distribution(entry)}; rename the class"
        )
    return found.labelled(label[1:]) if label else found


def point_to_file(name: str, known: Collection[str]) -> None:
    """Refuse the name of a file in the current folder that is not a plugin's name.

    Raises:
        PluginError: says how to name the file.
    """
    if name not in known and os.path.isfile(f"{name}.py"):  # noqa: PTH113 (no error for an odd name)
        raise PluginError(f"no plugin named '{name}'; to use the file: ./{name}.py")


def giver(plugin: type[AnyPlugin], word: str) -> str:
    """Where a plugin comes from: its distribution and entry point, or its path."""
    if is_place(word):
        return shown(place_of(plugin, word))
    entry = installed()[plugin.name]
    return f"{distribution(entry)}, {entry.value}"


def place_of(plugin: type[AnyPlugin], word: str) -> str:
    """The path of a plugin found by path, with its class."""
    word, label = without_label(word)
    where, name = split(word)
    if not name and where.endswith(f".{plugin.__name__}"):
        where = where.removesuffix(f".{plugin.__name__}")
    return f"{absolute(where)}:{name or plugin.__name__}{label}"


def _looked_for(place: str, base: Path) -> str:
    """The path made absolute; modules are also looked up in a folder."""
    if not split(place)[0].endswith(".py"):
        look_in(base)
    return absolute(place, base)


def _only_plugin(module: ModuleType, word: str) -> type[AnyPlugin]:
    """The only plugin class that a module defines."""
    classes = [
        item
        for name, item in vars(module).items()
        if isinstance(item, type) and issubclass(item, Plugin) and not name.startswith("_")
        if f"{item.__module__}.".startswith(f"{module.__name__}.")
    ]
    names = [found.__name__ for found in classes]
    if not names:
        raise PluginError(
            f"'{shown(word)}' has no plugin class, such as class SparklePlugin(Plugin[...])"
        )
    if len(names) > 1:
        said = f"'{shown(word)}' has {len(names)} plugins, {', '.join(names)}; choose one"
        raise PluginError(f"{said}: {shown(word)}:{names[0]}")
    return classes[0]
