"""Any optimizer class, with its own arguments, and parameter groups by name pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import nn
from torch.optim import Optimizer

from nexus_core.errors import ConfigError
from nexus_core.plugin import Plugin, PluginConfig, hookimpl
from nexus_core.signatures import Lax, Several
from nexus_plugins._shared.calls import Arguments, Call, as_json, callee, check_arguments, takes
from nexus_plugins._shared.parameters import freeze, matching

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["OptimConfig", "OptimGroupConfig", "OptimPlugin"]


class _Flat(PluginConfig):
    """Settings that also accept the optimizer's arguments as keys."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    lr: float | None = Field(
        default=None, ge=0, description="base learning rate; null: the shared one"
    )
    args: Arguments = Field(
        default={}, description="further arguments; may also be given next to `lr`"
    )

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, given: Any) -> Any:
        """Collect unknown keys as arguments of the optimizer."""
        if not isinstance(given, Mapping) or not isinstance(given.get("args", {}), Mapping):
            return given
        own = {key: value for key, value in given.items() if key in cls.model_fields}
        others = {key: value for key, value in given.items() if key not in own}
        return {**own, "args": as_json({**own.get("args", {}), **others})}

    @model_serializer(mode="wrap")
    def _stored(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        """Store the arguments next to the other settings, where `--set` looks for them."""
        content = dict(dump(self))
        return {**{k: v for k, v in content.items() if k != "args"}, **content["args"]}

    def arguments(self) -> Arguments:
        """All arguments by name, including the learning rate if set."""
        rate: Arguments = {} if self.lr is None else {"lr": self.lr}
        return {**rate, **self.args}


class OptimGroupConfig(_Flat):
    """Settings for the parameters whose names match a pattern."""

    match: str = Field(description="glob pattern of parameter names: '*.bias' matches every bias")


class OptimConfig(_Flat, Call):
    """An optimizer class and its arguments; every other key is passed to the class."""

    model_config = ConfigDict(
        json_schema_extra={
            "additionalProperties": True,
            "examples": [{"call": "torch.optim:RAdam", "lr": 1e-3, "weight_decay": 0.01}],
        }
    )

    lr: float | None = Field(
        default=None, ge=0, description="base learning rate; null: the default of the class"
    )
    groups: Lax[tuple[OptimGroupConfig, ...]] = Field(
        default=(), description="parameter groups with their own settings; the first match applies"
    )
    freeze: Several[str] = Field(
        default=(), description="patterns of names of parameters to freeze"
    )


class OptimPlugin(Plugin[OptimConfig]):
    """Trains with any optimizer class: one of `torch.optim`, of a package, or your own.

    All settings and defaults are those of the class. So, unlike with `optim_adamw`, weight decay
    applies to all parameters that no group excludes. A function works too; it receives the
    parameters or parameter groups, or the model if its first parameter is called `model`.
    """

    config_class = OptimConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "optimizer"

    if TYPE_CHECKING:

        def __new__(cls, config: OptimConfig | None = None, /, **settings: Any) -> Self:
            """Takes what its config takes: the arguments of the optimizer class."""

    def __post_init__(self) -> None:
        first = ("the parameters",)
        call = Call(call=self.config.call, args=self.config.arguments())
        self._make = callee(self.name, call, first, prefix="")
        self._of_model = takes(self._make.function, 0, "model", "module")
        if self._of_model and self.config.groups:
            raise ConfigError(
                f"optim.groups: {self._make.place} takes the model and groups its parameters "
                "itself; remove the groups"
            )
        is_class = isinstance(self._make.function, type)
        self._groups = [
            check_arguments(
                self._make.function,
                self._make.place,
                group.arguments(),
                f"optim.groups.{number}",
                first,
                whole=False,
            )
            if is_class
            else group.arguments()
            for number, group in enumerate(self.config.groups)
        ]

    @hookimpl
    def make_optimizer(self, engine: Engine) -> Optimizer:
        """Build the optimizer over the model's trained parameters.

        Raises:
            ConfigError: a pattern matches no parameter, all are frozen, or the class rejects its
                arguments.
        """
        freeze(engine.model, self.config.freeze, "optim.freeze")
        given = engine.model if self._of_model else self._parameters(engine.model)
        try:
            made: Optimizer = self._make(given)
        except (ValueError, TypeError) as error:
            said = f"optim: {self._make.place} rejects its arguments: {error}"
            raise ConfigError(said) from error
        return made

    def _parameters(self, model: nn.Module) -> list[Any]:
        """All parameters, or parameter groups if configured, with the ungrouped ones first."""
        rest = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not rest:
            raise ConfigError("optim: no parameter is left to train; freeze fewer")
        if not self.config.groups:
            return list(rest.values())
        groups: list[dict[str, Any]] = []
        for group, settings in zip(self.config.groups, self._groups, strict=True):
            names = matching(rest, group.match, "optim.groups", "parameter without a group")
            members = [rest.pop(name) for name in names]
            groups.append({"params": members, "name": group.match, **settings})
        return [{"params": list(rest.values()), "name": "others"}] * bool(rest) + groups
