"""Which plugins a run has, and which one a setting without a plugin name belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nexus_core.cli.config import RunConfig
from nexus_core.cli.local import plugin_class, point_to_file
from nexus_core.errors import ConfigError, suggestion
from nexus_core.plan import AnyPlugin, load, scan

__all__ = ["full_key", "keep_named_of_slot", "load_classes"]


def load_classes(names: Iterable[str], places: Mapping[str, str]) -> dict[str, type[AnyPlugin]]:
    """The class of each plugin, by name.

    Args:
        names: names of plugins.
        places: where plugins that are not installed live, by name.
    """
    scanned, classes = scan(), dict[str, type[AnyPlugin]]()
    for name in names:
        plain, _, label = name.partition("@")
        if name in places:
            classes[name] = plugin_class(places[name])
        elif plain in places:
            classes[name] = plugin_class(places[plain]).labelled(label)
        else:
            point_to_file(plain, scanned.names)
            classes[name] = load(name, scanned)
    return classes


def keep_named_of_slot(
    defaults: Sequence[str], named: Sequence[str], classes: Mapping[str, type[AnyPlugin]]
) -> list[str]:
    """The plugins of a run: a default yields its slot to a plugin that the user named."""
    taken = {classes[name].slot for name in named} - {None}
    kept = [name for name in defaults if name in named or classes[name].slot not in taken]
    return list(dict.fromkeys([*kept, *named]))


def full_key(
    key: str, origin: str, defaults: Sequence[str], named: Sequence[str], places: Mapping[str, str]
) -> str:
    """The key of a setting, with the plugin's name if exactly one plugin of the run has it.

    For example, `lr` becomes `adam.lr`; the engine's own keys are unchanged.

    Args:
        key: as written.
        origin: where it was written, for messages.
        defaults: plugins of the run that a preset brings.
        named: plugins that the user named.
        places: where plugins that are not installed live, by name.

    Raises:
        ConfigError: no plugin of the run has it, or several have.
    """
    known = [name for name in RunConfig.model_fields if name != "plugins"]
    if "." in key or key in known:
        return key
    classes = load_classes(dict.fromkeys([*defaults, *named]), places)
    enabled = keep_named_of_slot(defaults, named, classes)
    keys = {name: list(classes[name].config_class.model_fields) for name in enabled}
    found = [f"{name}.{key}" for name in enabled if key in keys[name]]
    if len(found) > 1:
        several = f"{len(found)} plugins of this run: {', '.join(found)}"
        raise ConfigError(f"{origin}: '{key}' is a setting of {several}; prefix it with one")
    if not found:
        near = suggestion(key, [*known, *sum(keys.values(), [])])
        if key in enabled:
            near = (
                f" It is a plugin: set {key}.KEY (nexus-plugins show {key}), or --plugins no:{key}"
            )
            raise ConfigError(f"{origin}: '{key}' is not a setting.{near}")
        raise ConfigError(
            f"{origin}: unknown key '{key}'.{near} The engine's keys: {', '.join(known)}; a "
            "plugin's: NAME.KEY, or KEY if only one plugin of the run has it"
        )
    return found[0]
