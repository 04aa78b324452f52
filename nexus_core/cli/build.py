"""From settings to plugins, their plan and the resolved config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nexus_core.cli.config import RunConfig
from nexus_core.cli.enabled import keep_named_of_slot, load_classes
from nexus_core.cli.fit import check_numbers, fitted, from_variables
from nexus_core.cli.settings import Settings
from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_core.places import in_run_folder
from nexus_core.plan import AnyPlugin, Plan, arrange
from nexus_core.plugin import PluginConfig

__all__ = ["Build", "build_plugins", "make_engine"]


@dataclass(frozen=True)
class Build:
    """A validated run before anything is built.

    Args:
        run: the engine's settings.
        plan: the plugins, in order.
        name: of the preset or file.
        configs: each plugin's settings, by its name, as written to the config.
        places: where plugins that are not installed live, by name.
    """

    run: RunConfig
    plan: Plan
    name: str
    configs: Mapping[str, PluginConfig]
    places: Mapping[str, str] = field(default_factory=dict)

    def resolved(self, out: Path) -> dict[str, Any]:
        """Every setting with its value, except secrets: a config file that repeats the run.

        Local code is named by its copy in the run folder.
        """
        settings = self.run.model_dump(mode="json", exclude={"plugins", "out"})
        blocks = {
            self.places.get(name, name): config.model_dump(mode="json")
            for name, config in self.configs.items()
        }
        return {**settings, "out": str(out), "plugins": in_run_folder(blocks)}

    def quiet(self) -> Build:
        """Set `quiet` for every plugin that has this setting."""
        for plugin in self.plan.plugins:
            if "quiet" in type(plugin.config).model_fields:
                plugin.config = plugin.config.model_copy(update={"quiet": True})
        return self


def build_plugins(settings: Settings) -> Build:
    """Load the plugin classes, resolve slots, validate configs and order the plugins.

    Raises:
        ConfigError, PluginError: a plugin, its settings or the order is invalid.
    """
    asked = dict.fromkeys((*settings.defaults, *settings.named))
    if not asked:
        raise ConfigError(
            f"'{settings.name}' names no plugins; base it on a preset ('preset: NAME'), or add "
            "'plugins:'"
        )
    classes = load_classes(asked, settings.places)
    names = keep_named_of_slot(settings.defaults, settings.named, classes)
    plan = arrange([_plugin(classes[name], settings) for name in names])
    configs = {plugin.name: plugin.config for plugin in plan.plugins}
    return Build(settings.run, plan, settings.name, configs, settings.places)


def _plugin(plugin_class: type[AnyPlugin], settings: Settings) -> AnyPlugin:
    name = plugin_class.name
    written = {
        place[2:]: text
        for place, text in settings.written.items()
        if place[:2] == ("plugins", name)
    }
    block = fitted(plugin_class.config_class, settings.run.plugins[name], written)
    try:
        plugin = plugin_class(**block)
        if "config" not in vars(plugin):
            raise ConfigError(f"plugin '{name}': its __init__ must call super().__init__()")
        check_numbers(name, plugin.config, block)
    except ConfigError as error:
        raise from_variables(error, settings.variables) from None
    return plugin


def make_engine(build: Build, out: Path) -> Engine:
    """Build data, model and optimizer through the plugins."""
    run = build.run
    return Engine(
        plugins=build.plan.plugins,
        seed=run.seed,
        device=run.device,
        accumulate=run.accumulate,
        cells=run.cells,
        step_at_epoch_end=run.step_at_epoch_end,
        log_every=run.log_every,
        out=out,
        config=build.resolved(out),
    )
