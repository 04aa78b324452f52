"""What a plugin is: a class with a config, its place among the others, and the hooks it answers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast, get_args

import pluggy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus_core.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from nexus_core.engine import Engine
    from nexus_core.loader import Batch
    from nexus_core.state import StateDict

__all__ = [
    *("Logger", "LoggerConfig", "Loss", "LossConfig"),
    *("Plugin", "PluginConfig", "config_error", "hookimpl"),
]

hookimpl = pluggy.HookimplMarker("nexus")
"""Marks a method as the answer to the hook of the same name."""


class PluginConfig(BaseModel):
    """Base of every plugin's settings: unknown keys are errors, values never change in a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=PluginConfig)


class Plugin(Generic[ConfigT]):
    """One ability of a run. Subclass it as `Plugin[YourConfig]` and answer hooks with `@hookimpl`.

    The class name gives the plugin's name: `ClipPlugin` is `clip`, `LrCosinePlugin` is
    `lr_cosine`; entry point, config block and state in a checkpoint go by the same name.

    Args:
        config: the settings as an object; or give them as keywords: `ClipPlugin(max_norm=1.0)`.

    Raises:
        ConfigError: a setting is unknown, missing or of the wrong type.
    """

    name: ClassVar[str] = "plugin"
    config_class: ClassVar[type[PluginConfig]] = PluginConfig
    before: ClassVar[tuple[str, ...]] = ()  # plugins that come after this one, where present
    after: ClassVar[tuple[str, ...]] = ()  # plugins that come before this one, where present
    requires: ClassVar[tuple[str, ...]] = ()  # plugins that must be present
    conflicts: ClassVar[tuple[str, ...]] = ()  # plugins that must be absent
    slot: ClassVar[str | None] = None  # a place that one plugin of a run fills: "lr", "model"
    state_version: ClassVar[int] = 1  # of the layout of `state_dict`; see `migrate`
    config: ConfigT

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__.removesuffix("Plugin"))
            cls.name = words.lower()
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, PluginConfig):
                    cls.config_class = argument

    def __init__(self, config: ConfigT | None = None, /, **settings: object) -> None:
        try:
            made = self.config_class.model_validate(settings) if config is None else config
        except ValidationError as error:
            raise config_error(error, self.name, self.config_class) from None
        self.config = cast(ConfigT, made)

    def state_dict(self) -> StateDict:
        """What this plugin must get back for a resumed run to end in the same bits."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Take back what `state_dict` gave."""

    def migrate(self, state: StateDict, from_version: int) -> StateDict:
        """Turn the state that an older `state_version` wrote into today's layout."""
        raise ConfigError(
            f"plugin '{self.name}' cannot read its state of version {from_version}; it expects "
            f"version {self.state_version}. Install the release that wrote the checkpoint."
        )


class LossConfig(PluginConfig):
    """Settings that every loss term has."""

    weight: float = Field(1.0, description="factor of this term in the total loss")


LossConfigT = TypeVar("LossConfigT", bound=LossConfig)


class Loss(Plugin[LossConfigT]):
    """One term of the loss: how many units a batch holds, and the sum over them.

    The engine divides by the units of the whole step (all micro-batches, all processes), so the
    gradient does not depend on how a step is split. `LossLmPlugin` is the term `lm`, logged as
    `train/lm_loss`.
    """

    term: ClassVar[str] = "loss"
    weight: float  # the factor of this term now; starts at the config's and may be scheduled

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "term" not in cls.__dict__:
            cls.term = cls.name.removeprefix("loss_")

    def __init__(self, config: LossConfigT | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.weight = self.config.weight

    def units(self, batch: Batch) -> Tensor | float:
        """How many units (labels, positions, ...) the batch holds: a number, or a 0-d tensor."""
        raise NotImplementedError(f"{type(self).__name__}.units")

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum of this term over the batch's units, 0-d; `output` is the `forward` hook's."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def validation_loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum that evaluation reports, where it differs from the one trained on."""
        return self.loss(batch, output)

    @hookimpl
    def loss_units(self, engine: Engine, batch: Batch) -> dict[str, Tensor | float]:
        return {self.term: self.units(batch)}

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> dict[str, Tensor]:
        measure = self.loss if engine.training else self.validation_loss
        return {self.term: measure(batch, output)}

    @hookimpl
    def loss_weight(self, engine: Engine) -> dict[str, float]:
        return {self.term: self.weight}


class LoggerConfig(PluginConfig):
    """Settings that every logger has."""


LoggerConfigT = TypeVar("LoggerConfigT", bound=LoggerConfig)


class Logger(Plugin[LoggerConfigT]):
    """A plugin that shows or stores metrics, and that may fail without stopping the run.

    Answer `open`, `write` and `close` instead of hooks. Only the main process calls them. A
    failure is a warning; after three in a row the logger is switched off for the rest of the run.
    """

    FAILURES_ALLOWED: ClassVar[int] = 3
    failures: int = 0  # in a row, so far

    def open(self, engine: Engine) -> None:
        """Prepare to write; the run starts, or goes on, at `engine.state.step`."""

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics, by name, as they are at `engine.state.step`."""
        raise NotImplementedError(f"{type(self).__name__}.write")

    def write_evaluation(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics of an evaluation; the same as `write` unless overridden."""
        self.write(engine, metrics)

    def close(self, engine: Engine) -> None:
        """Finish writing; the run is over, well or not."""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        self._attempt("open", engine)

    @hookimpl
    def on_log(self, engine: Engine, metrics: dict[str, float]) -> None:
        self._attempt("write", engine, metrics)

    @hookimpl
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        self._attempt("write_evaluation", engine, metrics)

    @hookimpl
    def on_close(self, engine: Engine) -> None:
        self._attempt("close", engine)

    def _attempt(self, action: str, engine: Engine, *arguments: Mapping[str, float]) -> None:
        if not engine.ranks.is_main or self.failures >= self.FAILURES_ALLOWED:
            return
        try:
            getattr(self, action)(engine, *arguments)
            self.failures = 0
        except Exception as error:  # a logger must never end a run of weeks
            self.failures += 1
            end = "it is switched off" if self.failures == self.FAILURES_ALLOWED else "going on"
            warnings.warn(
                f"logger '{self.name}' failed to {action} at step {engine.state.step} "
                f"({type(error).__name__}: {error}); {end}",
                RuntimeWarning,
                stacklevel=2,
            )


def config_error(error: ValidationError, prefix: str, model: type[BaseModel]) -> ConfigError:
    """Say in one line per fault which key is wrong, what it got and what it expects."""
    lines = []
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        key = ".".join([prefix, *path] if prefix else path)
        if fault["type"] == "extra_forbidden":
            known = list(model.model_fields) if len(path) == 1 else []
            line = f"unknown key '{key}'.{suggestion(path[-1], known)}"
            line += f" Known: {', '.join(known)}." if known else ""
        else:
            message = fault["msg"].removeprefix("Value error, ")
            line = f"{key}: got {fault['input']!r}; {message[:1].lower()}{message[1:]}"
        lines.append(line)
    return ConfigError("\n".join(lines))
