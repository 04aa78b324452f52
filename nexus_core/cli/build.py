"""From settings to plugins, their plan and the resolved config."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nexus_core.cli import distributed
from nexus_core.cli.config import RunConfig
from nexus_core.cli.settings import Settings
from nexus_core.engine import Engine
from nexus_core.errors import ConfigError, PluginError
from nexus_core.plan import AnyPlugin, Plan, arrange, load, scan
from nexus_core.plugin import Plugin

__all__ = [
    "Build",
    "build_plugins",
    "json_schema",
    "keep_named_of_slot",
    "make_engine",
    "run_folder",
]


@dataclass(frozen=True)
class Build:
    """A checked run that nothing has been built for yet.

    Args:
        run: the engine's settings.
        plan: the plugins, in order.
        name: of the preset or file.
    """

    run: RunConfig
    plan: Plan
    name: str

    def resolved(self, out: Path) -> dict[str, Any]:
        """Every setting with its value: as a config file, it repeats the run."""
        settings = self.run.model_dump(mode="json", exclude={"plugins", "out"})
        blocks = {p.name: p.config.model_dump(mode="json") for p in self.plan.plugins}
        return {**settings, "out": str(out), "plugins": blocks}

    def quiet(self) -> None:
        """Have every plugin that has a setting `quiet` be so."""
        for plugin in self.plan.plugins:
            if "quiet" in type(plugin.config).model_fields:
                plugin.config = plugin.config.model_copy(update={"quiet": True})


def build_plugins(settings: Settings) -> Build:
    """Load the classes of the named plugins, settle slots, validate configs and order them.

    Raises:
        ConfigError, PluginError: as the plugins and their order demand.
    """
    scanned = scan()
    classes = {name: load(name, scanned) for name in (*settings.defaults, *settings.named)}
    names = keep_named_of_slot(settings.defaults, settings.named, classes)
    plugins: list[Plugin[Any]] = [classes[n](**settings.run.plugins[n]) for n in names]
    return Build(settings.run, arrange(plugins), settings.name)


def keep_named_of_slot(
    defaults: Sequence[str], named: Sequence[str], classes: Mapping[str, type[AnyPlugin]]
) -> list[str]:
    """The plugins of a run: a default leaves its slot to a plugin that the user named for it."""
    taken = {classes[name].slot for name in named} - {None}
    kept = [name for name in defaults if name in named or classes[name].slot not in taken]
    return list(dict.fromkeys([*kept, *named]))


def make_engine(build: Build, out: Path) -> Engine:
    """Build data, model and optimizer through the plugins."""
    run = build.run
    return Engine(
        plugins=build.plan.plugins,
        seed=run.seed,
        device=run.device,
        accumulate=run.accumulate,
        log_every=run.log_every,
        out=out,
        config=build.resolved(out),
    )


def run_folder(build: Build, resume: str | None) -> Path:
    """The folder of this run: as set, of the run to resume, or a new one under `runs/`.

    All processes of a run get the one that the main process found.

    Raises:
        ConfigError: it holds another run, and `resume` was not asked for.
    """
    ranks = distributed.join(build)
    return distributed.of_main(ranks, lambda: _folder(build, distributed.resume_source(resume)))


def _folder(build: Build, resume: str | None) -> Path:
    if build.run.out is not None:
        if resume is None and (build.run.out / "config.yaml").exists():
            raise ConfigError(
                f"'{build.run.out}' holds a run already; go on with it by --resume auto, "
                "or choose another folder with --out"
            )
        return build.run.out
    if resume == "auto":
        named = re.compile(rf"{re.escape(build.name)}-\d{{8}}-\d{{6}}[b-k]?")
        runs = [path for path in Path("runs").glob("*") if named.fullmatch(path.name)]
        if earlier := [path for path in runs if (path / "checkpoints").is_dir()]:
            return max(earlier)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (Path("runs") / f"{build.name}-{stamp}{suffix}" for suffix in ["", *"bcdefghijk"])
    return next(path for path in names if not path.exists())


def write_config(resolved: dict[str, Any], out: Path) -> None:
    """Write the resolved config into the run's folder, all of it or nothing.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    draft = out / ".config.yaml.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        draft.replace(out / "config.yaml")
    except OSError as error:
        raise ConfigError(
            f"cannot write to the run's folder '{out}': {error.strerror}; "
            "choose another with --out, or make room"
        ) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file with every plugin that is installed and loads."""
    schema = RunConfig.model_json_schema()
    blocks: dict[str, Any] = {}
    scanned = scan()
    for name in sorted(scanned.names):
        try:
            block = load(name, scanned).config_class.model_json_schema()
        except PluginError:  # a broken neighbour is shown by `nexus-plugins list`
            continue
        schema.setdefault("$defs", {}).update(block.pop("$defs", {}))
        blocks[name] = {"anyOf": [block, {"type": ["boolean", "null"]}]}
    properties = schema["properties"]
    properties["plugins"].update(properties=blocks, additionalProperties=False)
    properties["preset"] = {"type": "string", "description": "preset that this file changes"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
