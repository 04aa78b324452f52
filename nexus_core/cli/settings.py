"""Merge settings from files, presets, environment and options.

Precedence: preset < file < `NEXUS_*` environment < `--set`. Each plugin validates its own block.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nexus_core.cli import yaml12
from nexus_core.cli.config import RunConfig
from nexus_core.cli.config_file import is_config_file, read_config_file
from nexus_core.cli.enabled import full_key
from nexus_core.cli.fit import check_numbers, fitted, from_variables
from nexus_core.cli.hints import instead
from nexus_core.cli.local import LocalPlugins, placed
from nexus_core.cli.resumed import config_base
from nexus_core.cli.yaml12 import Document
from nexus_core.errors import ConfigError, suggestion
from nexus_core.paths import expanded
from nexus_core.plugin import config_error

__all__ = ["Settings", "presets", "read_settings"]

Block = dict[str, Any]
PREFIX = "NEXUS_"


@dataclass(frozen=True)
class Settings:
    """The settings given by the user, before any plugin is loaded.

    Args:
        run: the engine's settings, with the raw blocks of the plugins.
        defaults: plugins of the preset, in order, whether or not they are also named.
        named: plugins that the user named, in order; they take a slot from a default.
        name: name of the preset or file, for the run folder.
        written: how values that are not text were written, by their path.
        variables: the environment variable a setting comes from, by its key.
        places: where plugins that are not installed live, by name.
    """

    run: RunConfig
    defaults: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    name: str = "run"
    written: Mapping[yaml12.Path, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)


def presets() -> dict[str, str]:
    """The name and package of every installed preset."""
    return {entry.name: entry.value for entry in entry_points(group="nexus.presets")}


def read_settings(
    source: str | None,
    plugins: str = "",
    sets: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
    replaced: Mapping[str, Any] | None = None,
    *,
    trusted: bool = True,
    anew: bool = True,
) -> Settings:
    """Collect the settings of a run from a config file or preset, environment and overrides.

    Args:
        source: path of a .yaml, .toml or .json file, or a preset's name; None: `quickstart`.
        plugins: "one,./two.py,no:three": plugins to add and to remove.
        sets: "sparkle.size=1": a plugin's key, or "until=100 steps": one of the engine's.
        environment: variables; `NEXUS_SPARKLE__SIZE=1` is `sparkle.size=1`.
        values: like `sets`, but by key and already parsed; they override `sets`.
        replaced: engine settings that replace those of the file.
        trusted: whether the user named the source; its relative paths are then relative to it.
        anew: whether local code is loaded anew; False within a run, whose code it would unload.

    Raises:
        ConfigError: something is unknown, missing or of the wrong type.
    """
    source = source or "quickstart"
    is_file = is_config_file(source)
    words, removed = _split_names(plugins)
    local = LocalPlugins(words, anew=anew)
    added = local.names
    document = Document({"preset": source})
    if is_file:
        path = Path(expanded(source))
        document = local.by_name(read_config_file(path), config_base(path) if trusted else None)
    content: Block = {**document.value, **(replaced or {})}
    base = _read_preset(content.pop("preset")) if "preset" in content else Document({})
    base = local.by_name(base, None)
    own = _plugin_blocks(content, source)
    merged = _Merged(base, Document(content, document.written), own)
    merged.leave_out([*removed, *(name for name, block in own.items() if block is False)])
    merged.add(added)
    for origin, key, text in _environment(environment or {}, merged.blocks):
        merged.set(key, yaml12.parse_value(text), origin)
    defaults = [name for name in base.value.get("plugins", {}) if name in merged.blocks]
    named = [name for name in dict.fromkeys((*own, *added)) if name in merged.blocks]
    for short, text in map(_assignment, sets):
        origin = f"--set {short}={text}"
        key = full_key(short, origin, defaults, named, local.places)
        merged.set(key, yaml12.parse_value(text), origin)
    for given, value in (values or {}).items():
        for key in merged.of_each_instance(given):
            merged.set(key, Document(value), key)
    if merged.content.get("accumulate") == "auto":  # a plugin splits the batch
        merged.content["accumulate"] = 1
        from nexus_core.plan import answering  # imports torch, so only where needed

        splitting = answering("cut_batch").name
        merged.add([splitting])
        named = list(dict.fromkeys([*named, splitting]))
    return Settings(
        merged.run(),
        tuple(defaults),
        tuple(named),
        Path(source).stem if is_file else source,
        merged.written,
        merged.variables,
        {name: place for name, place in local.places.items() if name in merged.blocks},
    )


class _Merged:
    """A preset, the file that overrides it, and the assignments that follow.

    Args:
        base: the preset.
        top: the file that overrides it.
        own: the file's plugin blocks; False removes the plugin.
    """

    def __init__(self, base: Document, top: Document, own: Mapping[str, Block | bool]) -> None:
        lower = {name: block or {} for name, block in base.value.get("plugins", {}).items()}
        upper = {name: block for name, block in own.items() if isinstance(block, dict)}
        self.content: Block = {**base.value, **top.value}
        self.content["plugins"] = self.blocks = {
            name: {**lower.get(name, {}), **upper.get(name, {})} for name in {**lower, **upper}
        }
        kept = {
            place: text
            for place, text in base.written.items()
            if place[0] not in top.value or (place[0] == "plugins" and not _reaches(upper, place))
        }
        self.written = {**kept, **top.written}
        self.variables: dict[str, str] = {}

    def leave_out(self, names: Iterable[str]) -> None:
        """Remove plugins from the run.

        Raises:
            ConfigError: one is not in the run.
        """
        for name in names:
            if self.blocks.pop(name, None) is None:
                raise ConfigError(
                    f"no:{name}: '{name}' is not in this run.{suggestion(name, self.blocks)} "
                    f"In it: {', '.join(self.blocks)}"
                )

    def add(self, names: Iterable[str]) -> None:
        """Add plugins to the run, with default settings if they are new."""
        for name in names:
            self.blocks.setdefault(name, {})

    def of_each_instance(self, key: str) -> list[str]:
        """The key for every instance of its plugin: `dew.size` and `dew@late.size`."""
        plugin, dot, rest = key.partition(".")
        names = [name for name in self.blocks if name.partition("@")[0] == plugin]
        return [f"{name}.{rest}" for name in names] if dot and names else [key]

    def set(self, key: str, given: Document, origin: str) -> None:
        """Assign one dotted key: an engine setting, or a plugin's with its name as prefix."""
        head, dot, rest = key.partition(".")
        given = Document(placed(given.value, Path.cwd()), given.written)
        if not dot:
            self.content[head] = given.value
            self._write((head,), given)
        else:
            self._set_in_block(head, rest.split("."), given, origin)
        if origin.startswith(PREFIX):
            self.variables[key] = origin
        else:
            self.variables.pop(key, None)

    def run(self) -> RunConfig:
        """The engine's settings, checked.

        Raises:
            ConfigError: some are invalid.
        """
        content = fitted(RunConfig, self.content, self.written)
        try:
            run = RunConfig.model_validate(content)
            check_numbers("", run, {key: content[key] for key in content if key != "plugins"})
        except ValidationError as error:
            raise from_variables(config_error(error, "", RunConfig), self.variables) from None
        return run

    def _set_in_block(self, name: str, path: list[str], given: Document, origin: str) -> None:
        if name not in self.blocks:
            leave_out = f" Write {'.'.join(path)}" if name == "plugins" and len(path) > 1 else ""
            add = (
                f" Add it with --plugins {name}"
                if name in entry_points(group="nexus.plugins").names
                else " All plugins: nexus-plugins list"
            )
            hint = leave_out or suggestion(name, self.blocks) or add
            raise ConfigError(f"{origin}: plugin '{name}' is not in this run.{hint}")
        if len(path) > yaml12.DEEPEST:
            raise ConfigError(f"{origin[:80]}...: nested deeper than {yaml12.DEEPEST} levels")
        block = self.blocks[name]
        for part in path[:-1]:
            block = block.setdefault(part, {})
            if not isinstance(block, dict):
                key = f"'{'.'.join([name, *path])}'"
                raise ConfigError(
                    f"{origin}: '{part}' of {key} is a value, not a block of settings"
                )
        block[path[-1]] = given.value
        self._write(("plugins", name, *path), given)

    def _write(self, place: yaml12.Path, given: Document) -> None:
        """Record how a value was written, replacing what was at its path."""
        old = [path for path in self.written if path[: len(place)] == place]
        for path in old:
            del self.written[path]
        self.written.update({(*place, *path): text for path, text in given.written.items()})


def _reaches(blocks: Mapping[str, Block], place: yaml12.Path) -> bool:
    """Whether the plugin blocks contain the key of a path within `plugins`."""
    return len(place) > 2 and place[2] in blocks.get(str(place[1]), {})


def _assignment(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as until='2 epochs'")
    return key.strip(), value


def _read_preset(name: object) -> Document:
    packages = presets()
    if not isinstance(name, str) or name not in packages:
        raise ConfigError(
            f"no preset or config file named '{name!s:.200}'."
            + (
                instead(str(name))
                or f"{suggestion(str(name), packages)} Presets: {', '.join(sorted(packages))}; a "
                "config file ends in .yaml, .toml or .json"
            )
        )
    text = files(packages[name]).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return yaml12.parse(text)
    except yaml12.YamlError as error:
        raise ConfigError(f"the preset '{name}' is not valid: {error}") from None


def _plugin_blocks(content: Block, source: str) -> dict[str, Block | bool]:
    blocks = {} if content.get("plugins") is None else content["plugins"]
    if not isinstance(blocks, dict):
        raise ConfigError(
            f"{source}: 'plugins' must map names to settings, such as NAME: {{}}; got "
            f"{blocks!r:.200}"
        )
    blocks = {
        name: {} if block is None or block is True else block for name, block in blocks.items()
    }
    for name, block in blocks.items():
        if block is not False and not isinstance(block, dict):
            raise ConfigError(
                f"{source}: plugins.{name} must be a block of settings, such as {{}} for the "
                f"defaults, or false; got {block!r:.200}"
            )
    return blocks


def _split_names(plugins: str) -> tuple[list[str], list[str]]:
    names = [name.strip() for name in plugins.split(",") if name.strip()]
    removed = [name.removeprefix("no:") for name in names if name.startswith("no:")]
    return [name for name in names if not name.startswith("no:")], removed


def _environment(
    environment: Mapping[str, str], blocks: Mapping[str, Block]
) -> Iterator[tuple[str, str, str]]:
    """Variable, key and text of each setting in the environment.

    `NEXUS_*` is used by others too (a service called nexus has `NEXUS_PORT`), so variables that
    name no setting are ignored, with a warning if the name is close to a setting's. An empty
    variable counts as unset.
    """
    known = [name for name in RunConfig.model_fields if name != "plugins"]
    for variable, text in sorted(environment.items()):
        key = variable.removeprefix(PREFIX).lower().replace("__", ".")
        if not variable.startswith(PREFIX) or not text:
            continue
        head, dot, rest = key.partition(".")
        if (head in blocks and rest) if dot else head in known:
            yield variable, key, text
        elif close := get_close_matches(head, [*blocks] if dot else known, 1, cutoff=0.75):
            if dot and head in entry_points(group="nexus.plugins").names:
                continue  # belongs to a plugin that is not in this run
            meant = variable.replace(variable.removeprefix(PREFIX)[: len(head)], close[0].upper())
            warnings.warn(
                f"{variable} is not a setting of this run and is ignored; did you mean {meant}?",
                RuntimeWarning,
                stacklevel=2,
            )
