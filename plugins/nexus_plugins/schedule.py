"""Moves any number of a plugin, of an optimizer's group or of the engine over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from nexus_core import ConfigError, Interval, IntervalField, Plugin, PluginConfig, hookimpl
from nexus_core.errors import suggestion

if TYPE_CHECKING:
    from nexus_core import Engine, TrainState

__all__ = ["RuleConfig", "ScheduleConfig", "SchedulePlugin"]


class RuleConfig(PluginConfig):
    """How one number goes."""

    target: str = Field(
        description="'<plugin>.<attribute>' as in loss_world.weight, 'optimizer.<setting>' or "
        "'optimizer.<group>.<setting>' as in optimizer.weight_decay, or 'engine.accumulate'"
    )
    start: float = Field(description="value at the start, in the unit of the target")
    end: float = Field(description="value at the end")
    over: IntervalField = Field(Interval(1000, "steps"), description="length of the way")
    begin: IntervalField | None = Field(None, description="what comes before the way; null: none")
    shape: Literal["linear", "cosine", "exponential", "step"] = Field(
        "linear", description="the way; exponential: by equal factors; step: at its end"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.shape == "exponential" and not self.start * self.end > 0:
            raise ValueError("shape 'exponential' needs a start and an end of one sign, not 0")
        if self.begin is not None and self.begin.unit != self.over.unit:
            raise ValueError(f"begin must be in {self.over.unit}, as over is")
        return self

    def value(self, state: TrainState) -> float:
        """Where the number is now: a pure function of progress."""
        done = state.counted(self.over.unit) - (self.begin.amount if self.begin else 0.0)
        share = min(1.0, max(0.0, done / self.over.amount))
        if self.shape == "exponential":
            return self.start * math.pow(self.end / self.start, share)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        if self.shape == "step":
            share = float(share >= 1)
        return self.start + share * (self.end - self.start)


class ScheduleConfig(PluginConfig):
    """Settings of the scheduled numbers."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"rules": [{"target": "loss_lm.weight", "start": 0.5, "end": 1.0}]}]
        }
    )
    rules: tuple[RuleConfig, ...] = Field(min_length=1, description="one for each number")


@dataclass(frozen=True)
class _Place:
    """Where a number lives: a key of a group's settings, or of an object's attributes."""

    owner: dict[str, Any]
    key: str
    whole: bool


class SchedulePlugin(Plugin[ScheduleConfig]):
    """Sets numbers of the run before each step, by rules over its progress.

    `loss_world.weight` is the attribute `weight` of the plugin `loss_world`; `engine.accumulate`
    makes the batch grow; a group is named as in the optimizer's `groups`. A number that is whole
    stays whole. Nothing is saved: values are pure functions of how far the run is. A base
    learning rate (`optimizer.lr`) is multiplied by the schedule of the run as ever.
    """

    _places: list[tuple[RuleConfig, _Place]]

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Find the targets, and set them for the first step.

        Raises:
            ConfigError: there is no such target, or it is no number.
        """
        rules = self.config.rules
        self._places = [(rule, place) for rule in rules for place in _places(rule.target, engine)]
        self._apply(engine)

    @hookimpl
    def lr_scale(self, engine: Engine) -> float | None:
        """Set the base learning rates of this step, just before they are multiplied."""
        return 1.0 if self._apply(engine, base_lr=True) else None

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Set the numbers for the next step."""
        self._apply(engine)

    @hookimpl
    def collect_metrics(self, engine: Engine) -> dict[str, float]:
        """The numbers as they are, as `schedule/<target>`."""
        return {f"schedule/{r.target}": r.value(engine.state) for r in self.config.rules}

    def _apply(self, engine: Engine, *, base_lr: bool = False) -> bool:
        """Set the base learning rates, or all other numbers; whether there are any."""
        chosen = [pair for pair in self._places if (pair[1].key == "initial_lr") is base_lr]
        for rule, place in chosen:
            value = rule.value(engine.state)
            place.owner[place.key] = round(value) if place.whole else value
        return bool(chosen)


def _places(target: str, engine: Engine) -> list[_Place]:
    owner, _, rest = target.partition(".")
    if owner == "optimizer":
        name, _, key = rest.rpartition(".")
        groups = engine.optimizer.param_groups
        names = [str(group.get("name", number)) for number, group in enumerate(groups)]
        chosen = [g for g, n in zip(groups, names, strict=True) if name in ("", n)]
        _check(bool(chosen), target, name, names)
        key = "initial_lr" if key == "lr" else key  # the engine makes `lr` of it
        return [_place(group, key, group, target) for group in chosen]
    if owner == "engine":
        return [_place(vars(engine), rest, {"accumulate": engine.accumulate}, target)]
    _check(owner in engine.plugins, target, owner, ["engine", "optimizer", *engine.plugins])
    return [_place(mine := vars(engine.plugins[owner]), rest, mine, target)]


def _place(owner: dict[str, Any], key: str, known: Mapping[str, Any], target: str) -> _Place:
    numbers = [k for k, v in known.items() if type(v) in (int, float) and k[0] != "_"]
    _check(key in numbers, target, key, numbers)
    return _Place(owner, key, isinstance(known[key], int))


def _check(found: bool, target: str, name: str, known: list[str]) -> None:
    if not found:
        raise ConfigError(
            f"schedule: there is no number '{target}' to set: no '{name}'."
            f"{suggestion(name, known)} Known: {', '.join(known) or 'none'}"
        )
