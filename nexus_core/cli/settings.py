"""Settings from files, presets, environment and options, merged by precedence.

Precedence: preset < file < `NEXUS_*` environment < `--set`. A plugin validates its own block.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nexus_core.cli.config import RunConfig
from nexus_core.errors import ConfigError, suggestion
from nexus_core.plugin import config_error

__all__ = ["Settings", "presets", "read_settings"]

Block = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What was asked for, before any plugin is loaded.

    Args:
        run: the engine's settings, with the raw blocks of the plugins.
        defaults: plugins that the preset brings, in order.
        named: plugins that the user named, in order; they win a slot over the defaults.
        name: of the preset or file, for the run folder.
    """

    run: RunConfig
    defaults: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    name: str = "run"


def presets() -> dict[str, str]:
    """Name and package of every installed preset."""
    return {entry.name: entry.value for entry in entry_points(group="nexus.presets")}


def read_settings(
    source: str | None,
    plugins: str = "",
    sets: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Gather the settings of a run from a config file or preset, environment and overrides.

    Args:
        source: path of a .yaml, .toml or .json file, or a preset's name; None: `quickstart`.
        plugins: "one,two,no:three": plugins to add and to leave out.
        sets: "sparkle.size=1": a plugin's key, or "until=100 steps": one of the engine's.
        environment: variables; `NEXUS_SPARKLE__SIZE=1` is `sparkle.size=1`.

    Raises:
        ConfigError: something is unknown, missing or of the wrong type.
    """
    source = source or "quickstart"
    is_file = Path(source).suffix in (".yaml", ".yml", ".toml", ".json")
    content = _read_file(Path(source)) if is_file else {"preset": source}
    base = _read_preset(content.pop("preset")) if "preset" in content else {}
    own = _plugin_blocks(content, source)
    merged = _merge(base, {**content, "plugins": {k: v for k, v in own.items() if v is not False}})
    blocks: Block = merged["plugins"]
    added, removed = _split_names(plugins)
    for name in [*removed, *(name for name, block in own.items() if block is False)]:
        if blocks.pop(name, None) is None:
            raise ConfigError(
                f"no:{name}: '{name}' is not in this run.{suggestion(name, blocks)} "
                f"In it: {', '.join(blocks)}"
            )
    for name in added:
        blocks.setdefault(name, {})
    for key, value in _environment(environment or {}, blocks):
        _set(merged, key, value, f"NEXUS_{key.upper().replace('.', '__')}")
    for assignment in sets:
        key, sign, value = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as until='2 epochs'")
        _set(merged, key.strip(), _scalar(value), f"--set {assignment}")
    if merged.get("accumulate") == "auto":  # the batch stays whole; a plugin splits it
        merged["accumulate"] = 1
        from nexus_core.plan import answering  # and torch with it, where it is needed

        splitting = answering("cut_batch").name
        blocks.setdefault(splitting, {})
        added.append(splitting)
    named = [*(name for name in own if name in blocks), *added]
    try:
        run = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise config_error(error, "", RunConfig) from None
    defaults = tuple(name for name in blocks if name not in named)
    stem = Path(source).stem if is_file else source
    return Settings(run, defaults, tuple(dict.fromkeys(named)), stem)


def _read_preset(name: object) -> Block:
    packages = presets()
    if name not in packages:
        raise ConfigError(
            f"no preset or config file named '{name}'.{suggestion(str(name), packages)} Presets: "
            f"{', '.join(sorted(packages))}; a config file ends in .yaml, .toml or .json"
        )
    text = files(packages[str(name)]).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content: Block = yaml.safe_load(text)
    return content


def _read_file(path: Path) -> Block:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ConfigError(f"cannot read the config file '{path}': {reason}") from error
    try:
        if path.suffix == ".toml":
            content: object = tomllib.loads(text)
        else:
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        kind = path.suffix.removeprefix(".")
        raise ConfigError(f"the config file '{path}' is not valid {kind}: {said}") from None
    if not isinstance(content, dict) or not content:
        got = "nothing" if not content else type(content).__name__
        raise ConfigError(f"the config file '{path}' holds {got}; expected keys such as 'until:'")
    return content


def _plugin_blocks(content: Block, source: str) -> dict[str, Block | bool]:
    blocks = content.get("plugins") or {}
    if not isinstance(blocks, dict):
        raise ConfigError(f"{source}: 'plugins' must map names to settings, got {blocks!r}")
    blocks = {name: {} if block in (None, True) else block for name, block in blocks.items()}
    for name, block in blocks.items():
        if block is not False and not isinstance(block, dict):
            raise ConfigError(
                f"{source}: plugins.{name} must be a block of settings or false, got {block!r}"
            )
    return blocks


def _merge(base: Block, top: Block) -> Block:
    """`top` over `base`; within plugins, key by key."""
    merged = {**base, **top}
    lower, upper = base.get("plugins", {}), top.get("plugins", {})
    merged["plugins"] = {
        name: {**(lower.get(name) or {}), **upper.get(name, {})} for name in {**lower, **upper}
    }
    return merged


def _split_names(plugins: str) -> tuple[list[str], list[str]]:
    names = [name.strip() for name in plugins.split(",") if name.strip()]
    removed = [name.removeprefix("no:") for name in names if name.startswith("no:")]
    return [name for name in names if not name.startswith("no:")], removed


def _environment(environment: Mapping[str, str], blocks: Block) -> list[tuple[str, Any]]:
    """Assignments from `NEXUS_*`; those of plugins that are not in this run are passed over."""
    found = []
    for name, value in sorted(environment.items()):
        if name.startswith("NEXUS_"):
            key = name.removeprefix("NEXUS_").lower().replace("__", ".")
            if "." not in key or key.split(".")[0] in blocks:
                found.append((key, _scalar(value)))
    return found


def _set(settings: Block, key: str, value: Any, origin: str) -> None:
    """Assign one dotted key: the engine's own, or a plugin's behind the plugin's name."""
    head, dot, rest = key.partition(".")
    blocks = settings["plugins"]
    if not dot:
        known = [name for name in RunConfig.model_fields if name != "plugins"]
        if head not in known:
            raise ConfigError(
                f"{origin}: unknown key '{head}'.{suggestion(head, known)} The engine's keys: "
                f"{', '.join(known)}; a plugin's: NAME.KEY"
            )
        settings[head] = value
        return
    if head not in blocks:
        raise ConfigError(
            f"{origin}: plugin '{head}' is not in this run.{suggestion(head, blocks)} "
            f"Add it with --plugins {head}"
        )
    *path, last = rest.split(".")
    block = blocks[head]
    for part in path:
        block = block.setdefault(part, {})
        if not isinstance(block, dict):
            raise ConfigError(f"{origin}: '{part}' of '{key}' is a value, not a block of settings")
    block[last] = value


def _scalar(text: str) -> Any:
    """A value as YAML reads it; text that YAML cannot read stays text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
