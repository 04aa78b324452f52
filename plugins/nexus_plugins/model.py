"""A model built by your own function or class."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from torch import nn

from nexus_core.errors import ConfigError
from nexus_core.plugin import Plugin, hookimpl
from nexus_plugins._shared.calls import Call, callee

__all__ = ["ModelConfig", "ModelPlugin"]


class ModelConfig(Call):
    """The function or class that builds the model, and its arguments."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"call": "./net.py:build", "args": {"width": 64}}]}
    )


class ModelPlugin(Plugin[ModelConfig]):
    """Trains a model built by a function or class, with arguments from the settings.

    The arguments are checked against its signature before anything is built. The generators are
    seeded with the run's seed when it is called; the model is then moved to the run's device.
    """

    config_class = ModelConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "model"

    def __post_init__(self) -> None:
        self._make = callee(self.name, self.config)

    @hookimpl
    def make_model(self) -> nn.Module:
        """Call the function or class.

        Raises:
            ConfigError: it does not return a module.
        """
        model = self._make()
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model: {self._make.place} returned a {type(model).__name__}; it must return a "
                "torch.nn.Module"
            )
        return model
