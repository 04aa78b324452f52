"""One model of a contest: its plugins, and the run as they would see it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import JsonValue
from torch import nn

from nexus_core.cli.local import is_place, plugin_class
from nexus_core.defaults import Defaults
from nexus_core.errors import ConfigError
from nexus_core.places import in_settings
from nexus_core.plan import HOOK_NAMES, arrange
from nexus_core.plugin import Plugin
from nexus_core.relay import relay
from nexus_core.snapshot import migrated

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.events import Hooks, Run
    from nexus_core.meter import Finish, Measured, Number
    from nexus_core.snapshot import PluginState
    from nexus_core.step import Step

__all__ = ["Contender", "Plugins"]

Plugins = dict[str, dict[str, JsonValue]]
"""Settings of plugins by their names."""
Value = TypeVar("Value")
FORWARDED = (
    "make_model",
    "on_build",
    "on_start",
    "forward",
    "loss_units",
    "loss_terms",
    "loss_weight",
    "on_step",
    "summarize",
)
"""The hooks that a contest asks of a contender's plugins."""


@dataclass(frozen=True)
class Contender:
    """One model on one puzzle."""

    puzzle: str
    name: str
    plugins: tuple[Plugin[Any], ...]
    """One that makes the model, losses, and others that have only hooks of `FORWARDED`."""
    hook: Hooks
    """Calls the hooks of these plugins alone."""

    @classmethod
    def of(cls, puzzle: str, name: str, settings: Plugins) -> Contender:
        """From the settings of its plugins.

        Raises:
            ConfigError: puzzle or name cannot name a module, none or several plugins make a model,
                there is no loss, or one has a hook that is not forwarded.
        """
        for word in (puzzle, name):
            if not word.isidentifier() or hasattr(nn.ModuleDict, word):
                raise ConfigError(
                    f"contest.puzzles.{puzzle}.{name}: '{word}' cannot name a module of a model; "
                    "use another name, of letters, digits and underscores"
                )
        made = [_class_of(plugin)(**given) for plugin, given in settings.items()]
        makers = [plugin for plugin in made if plugin.slot == "model"]
        if len(makers) != 1 or not any("loss_units" in _hooks(plugin) for plugin in made):
            raise ConfigError(
                f"contest.puzzles.{puzzle}.{name} has {', '.join(settings) or 'no plugins'}; give "
                "one plugin that makes a model, such as model_nexus, and at least one loss"
            )
        for plugin in made:
            if others := [hook for hook in _hooks(plugin) if hook not in FORWARDED]:
                raise ConfigError(
                    f"contest.puzzles.{puzzle}.{name}: {plugin.name} implements "
                    f"{', '.join(others)}, which a contest does not call for a single contender; "
                    f"it calls {', '.join(FORWARDED)}. Use another plugin, or train this model in "
                    "a run of its own"
                )
        plan = arrange(made)
        return cls(puzzle, name, plan.plugins, relay(plan, Defaults()))

    @property
    def place(self) -> str:
        """The prefix of its terms and metrics."""
        return f"{self.puzzle}/{self.name}"

    def model(self, models: nn.Module) -> nn.Module:
        """Its own of the contest's models."""
        return models.get_submodule(f"{self.puzzle}.{self.name}")

    def part(self, batch: Batch) -> Batch:
        """Its puzzle's part of a batch.

        Raises:
            ConfigError: the batch has none.
        """
        if self.puzzle not in batch:
            raise ConfigError(
                f"contest.puzzles.{self.puzzle}: the data have no such puzzle; they have "
                f"{', '.join(batch)}"
            )
        part: Batch = batch[self.puzzle]
        return part

    def alone(self, run: Run) -> Run:
        """The run as if its model were the only one."""
        return cast("Run", _Alone(run, self))

    def own(self, step: Step | None) -> Step | None:
        """The step with only its part of the batches and only its terms."""
        return step and replace(
            step,
            micro=tuple(one._replace(batch=self.part(one.batch)) for one in step.micro),
            counts=tuple(map(self._terms, step.counts)),
            units=self._terms(step.units),
            weights=self._terms(step.weights),
            losses=self._terms(step.losses),
            followed=0,
        )

    def state_dict(self) -> dict[str, PluginState]:
        """The states of its plugins, of those that have any."""
        return {
            plugin.name: {"version": plugin.state_version, "state": state}
            for plugin in self.plugins
            if (state := plugin.state_dict())
        }

    def load_state_dict(self, saved: Mapping[str, PluginState]) -> None:
        """Restore the states of its plugins."""
        for plugin in self.plugins:
            if (found := saved.get(plugin.name)) is not None:
                plugin.load_state_dict(migrated(plugin, found))

    def _terms(self, numbers: Mapping[str, Value]) -> dict[str, Value]:
        start = f"{self.place}/"
        return {
            name.removeprefix(start): number
            for name, number in numbers.items()
            if name.startswith(start)
        }


class _Alone:
    """A run with one contender's model, plugins and metrics, and without data."""

    data = None

    def __init__(self, run: Run, one: Contender) -> None:
        self._run, self._one, self.hook = run, one, one.hook
        self.plugins = {plugin.name: plugin for plugin in one.plugins}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    @property
    def model(self) -> nn.Module:
        return self._one.model(self._run.model)

    def parameters(self, turn: str | None = None) -> list[nn.Parameter]:
        return self._among(self._run.parameters(turn))

    def untrained(self) -> list[nn.Parameter]:
        return self._among(self._run.untrained())

    def log(
        self, name: str, value: Number | Measured, units: Number = 1.0, finish: Finish = None
    ) -> None:
        split = "" if "/" in name else f"{self._run.split}/"
        self._run.log(f"{split}{self._one.place}/{name}", value, units, finish)

    def _among(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        own = set(map(id, self.model.parameters()))
        return [parameter for parameter in parameters if id(parameter) in own]


def _class_of(word: str) -> type[Plugin[Any]]:
    """The class of a plugin given by name, or by path and class.

    Raises:
        ConfigError: it is given by path alone, so that the run would not keep a copy of it.
    """
    found = plugin_class(word)
    if is_place(word) and not in_settings(word):
        raise ConfigError(f"contest.puzzles: '{word}' has no class; write {word}:{found.__name__}")
    return found


def _hooks(plugin: Plugin[Any]) -> list[str]:
    """The hooks that a plugin implements."""
    return [name for name in HOOK_NAMES if hasattr(getattr(plugin, name, None), "nexus_impl")]
