"""Changes any number of a plugin, optimizer group or the engine over the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from nexus_core import ConfigError, Plugin, PluginConfig, hookimpl
from nexus_core.errors import suggestion
from nexus_core.signatures import Lax
from nexus_plugins.schedule.course import Course

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["RuleConfig", "ScheduleConfig", "SchedulePlugin"]

_EXAMPLE: Any = {"rules": [{"target": "loss_lm.weight", "start": 0.5, "end": 1.0}]}
Owner = Callable[[], dict[str, Any]]


class RuleConfig(Course):
    """Which number changes, and how."""

    target: str = Field(
        description="'<plugin>.<attribute>' as in loss_world.weight, 'optimizer.<setting>' or "
        "'optimizer.<group>.<setting>' as in optimizer.all.matrices.weight_decay, or "
        "'engine.accumulate'"
    )


class ScheduleConfig(PluginConfig):
    """Settings of the scheduled numbers."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})
    rules: Lax[tuple[RuleConfig, ...]] = Field(min_length=1, description="one schedule per value")


@dataclass(frozen=True)
class _Place:
    """A rule, and the attributes or settings that hold its number; a load may replace those."""

    rule: RuleConfig
    owner: Owner
    key: str


class SchedulePlugin(Plugin[ScheduleConfig]):
    """Sets numbers of the run before each step, by rules over its progress.

    `loss_world.weight` is the attribute `weight` of the plugin `loss_world`; `engine.accumulate`
    changes the batch size; a group is named as in the optimizer's `groups`. Integers stay integers,
    except the optimizer's, where 0 often means 0.0. Nothing is saved: values are pure functions of
    progress. A base learning rate (`optimizer.lr`) is multiplied by the run's schedule as before.
    """

    config_class = ScheduleConfig
    _settings: list[_Place]
    _attributes: list[_Place]

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Find the targets, and set their values for the first batch.

        Raises:
            ConfigError: a target does not exist, or is not a number.
        """
        self._settings, self._attributes = [], []
        for rule in self.config.rules:
            setting = rule.target.startswith("optimizer.")
            (self._settings if setting else self._attributes).extend(_places(rule, engine))
        self.on_step(engine)

    @hookimpl
    def lr_scale(self, engine: Engine) -> float | None:
        """Set the optimizer's settings, just before they are used."""
        for place in self._settings:
            place.owner()[place.key] = place.rule.value(engine.state, engine.horizon)
        return 1.0 if any(place.key == "initial_lr" for place in self._settings) else None

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Set the other numbers for the next step."""
        for place in self._attributes:
            owner, value = place.owner(), place.rule.value(engine.state, engine.horizon)
            owner[place.key] = round(value) if isinstance(owner[place.key], int) else value

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The current numbers, as `schedule/<target>`."""
        places = self._settings + self._attributes
        return {f"schedule/{place.rule.target}": place.owner()[place.key] for place in places}


def _places(rule: RuleConfig, engine: Engine) -> list[_Place]:
    name, _, key = rule.target.rpartition(".")
    owners = _owners(engine)
    chosen = [owner for known, owner in owners if f"{known}.".startswith(f"{name}.")]
    _check(bool(chosen), rule.target, name or key, [known for known, _ in owners])
    if rule.target.startswith("optimizer.") and key == "lr":
        key = "initial_lr"  # the engine derives `lr` from it
    for owner in chosen:
        numbers = [k for k, v in owner().items() if type(v) in (int, float) and k[0] != "_"]
        numbers = ["accumulate"] if name == "engine" else numbers
        _check(key in numbers, rule.target, key, numbers)
    return [_Place(rule, owner, key) for owner in chosen]


def _owners(engine: Engine) -> list[tuple[str, Owner]]:
    """The objects with numbers, by name: the engine, its plugins and its optimizer's groups."""
    objects = {"engine": engine, **engine.plugins}
    groups = enumerate(engine.optimizer.param_groups)
    return [
        *((name, partial(getattr, owner, "__dict__")) for name, owner in objects.items()),
        *((f"optimizer.{g.get('name', i)}", partial(_group, engine, i)) for i, g in groups),
    ]


def _group(engine: Engine, number: int) -> dict[str, Any]:
    return engine.optimizer.param_groups[number]


def _check(found: bool, target: str, name: str, known: list[str]) -> None:
    if not found:
        raise ConfigError(
            f"schedule: no number '{target}' to set: no '{name}'."
            f"{suggestion(name, known)} Known: {', '.join(known) or 'none'}"
        )
