"""What a plugin is: a class with a config, its place among the others, and the hooks it answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args

import pluggy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexus_core.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from nexus_core.engine import Engine
    from nexus_core.loader import Batch
    from nexus_core.state import StateDict

__all__ = ["Loss", "LossConfig", "Plugin", "PluginConfig", "config_error", "hookimpl"]

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
    before: ClassVar[tuple[str, ...]] = ()
    """Plugins that must come after this one, where they are present."""
    after: ClassVar[tuple[str, ...]] = ()
    """Plugins that must come before this one, where they are present."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Plugins that must be present."""
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Plugins that must not be present."""
    slot: ClassVar[str | None] = None
    """A place that only one plugin of a run can fill: "lr", "optimizer", "model", ..."""
    state_version: ClassVar[int] = 1
    """Raise it when the layout of `state_dict` changes; see `migrate`."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__.removesuffix("Plugin"))
            cls.name = words.lower()
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, PluginConfig):
                    cls.config_class = argument

    config: ConfigT

    def __init__(self, config: ConfigT | None = None, /, **settings: object) -> None:
        self.config = config if config is not None else self._validated(settings)

    @classmethod
    def _validated(cls, settings: Mapping[str, object]) -> Any:
        try:
            return cls.config_class.model_validate(dict(settings))
        except ValidationError as error:
            raise config_error(error, cls.name, cls.config_class) from None

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

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.config)
        return f"{type(self).__name__}({settings})"


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
    weight: float
    """Factor of this term now; starts at the config's and may be scheduled."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "term" not in cls.__dict__:
            cls.term = cls.name.removeprefix("loss_")

    def __init__(self, config: LossConfigT | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self.weight = self.config.weight

    def units(self, batch: Batch) -> Tensor | float:
        """How many units (labels, positions, ...) the batch holds; known before the forward pass.

        Returns:
            A number, or a tensor without dimensions on the batch's device.
        """
        raise NotImplementedError(f"{type(self).__name__}.units")

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The sum of this term over the units of the batch, with its graph.

        Args:
            batch: what the loader gave, on the device.
            output: what the `forward` hook answered.

        Returns:
            A tensor without dimensions.
        """
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
