"""What a plugin is: a class with a config, ordering constraints, and hook implementations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeAlias, TypeVar, Union, overload

import pluggy
from pydantic import (
    BaseModel,
    ConfigDict,
    SecretStr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from nexus_core.errors import (
    CheckpointError,
    ConfigError,
    NexusError,
    PluginError,
    hint_value,
    suggestion,
)
from nexus_core.signatures import Configured, Made_co, P, describe

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from torch import Tensor

__all__ = [
    "Plugin",
    "PluginConfig",
    "StateDict",
    "StateValue",
    "config_error",
    "hookimpl",
    "name_of",
]

StateValue: TypeAlias = Union[
    bool, int, float, str, "Tensor", "list[StateValue]", "dict[str, StateValue]", None
]
"""What a state may contain: JSON values and tensors."""

StateDict: TypeAlias = dict[str, StateValue]
"""What a plugin keeps in a checkpoint: tensors, numbers, text, and lists and dicts of them."""

_marker = pluggy.HookimplMarker("nexus")
Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def hookimpl(function: Function, /) -> Function:
    """Used as `@hookimpl`."""


@overload
def hookimpl(
    *,
    stage: str | None = None,
    wrapper: bool = False,
    tryfirst: bool = False,
    trylast: bool = False,
    optionalhook: bool = False,
) -> Callable[[Function], Function]:
    """Used as `@hookimpl(stage="limit")`."""


def hookimpl(
    function: Any = None,
    /,
    *,
    stage: str | None = None,
    wrapper: bool = False,
    tryfirst: bool = False,
    trylast: bool = False,
    optionalhook: bool = False,
) -> Any:
    """Mark a method as the implementation of the hook of the same name.

    Args:
        function: the method, if the decorator is used without arguments.
        stage: one of the hook's stages (see `nexus_core.events`); None: the default one.
        wrapper: the method is a generator around the other implementations; it yields once.
        tryfirst: before all others, whatever their stage; only one plugin of a run may use it.
        trylast: after all others, whatever their stage.
        optionalhook: ignored if this release has no such hook.
    """

    def mark(method: Any) -> Any:
        method.nexus_stage = stage
        return _marker(
            method, wrapper=wrapper, tryfirst=tryfirst, trylast=trylast, optionalhook=optionalhook
        )

    return mark if function is None else mark(function)


class PluginConfig(BaseModel):
    """Base of every plugin's settings: unknown keys are errors, values are frozen.

    Numbers must be finite unless the field has `allow_inf_nan=True`. Stored settings
    (`model_dump(mode="json")`) omit secrets, and have "inf" for infinite numbers.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @model_serializer(mode="wrap")
    def _stored(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        return _storable(dump(self)) if info.mode == "json" else dump(self)


_SECRET = str(SecretStr("any"))
ConfigT = TypeVar("ConfigT", bound=PluginConfig)


class _Configured(Generic[ConfigT]):
    """What is made from settings; `Plugin.__new__` tells type checkers from which."""

    name: ClassVar[str] = "plugin"
    config_class: type[ConfigT] | Any = PluginConfig  # of the class, not of an object
    config: ConfigT

    @overload
    def __init__(
        self: Configured[P, Made_co],
        config: ConfigT | None = None,
        /,
        *args: P.args,
        **settings: P.kwargs,
    ) -> None:
        """Takes its settings by name; `help()` of the class describes them."""

    @overload
    def __init__(self, config: ConfigT | None = None, /, **settings: Any) -> None:
        """Takes what an `__init__` of a subclass passes on."""

    def __init__(self, config: Any = None, /, **settings: Any) -> None:  # type: ignore[misc]  # *args
        if config is not None and (settings or not isinstance(config, self.config_class)):
            raise ConfigError(
                f"{type(self).__name__} takes its settings by name, such as "
                f"{type(self).__name__}({next(iter(self.config_class.model_fields), 'key')}=...), "
                f"or a {self.config_class.__name__}, not both; got {config!r:.80}"
            )
        try:
            self.config = self.config_class.model_validate(settings) if config is None else config
        except ValidationError as error:
            raise config_error(error, self.name, self.config_class) from None
        self._set_up()
        self.__post_init__()

    def _set_up(self) -> None:
        """Set up what a base class needs, even if a subclass has its own `__post_init__`."""

    def __post_init__(self) -> None:
        """Set up what the object needs besides `config`, which is set and validated by then."""


class Plugin(_Configured[ConfigT]):
    """One feature of a run. Subclass `Plugin[YourConfig]` and implement hooks with `@hookimpl`.

    The class name gives the plugin's name: `SparklePlugin` is `sparkle`, `SlowFadePlugin`
    is `slow_fade`; entry point, config block and state in a checkpoint use the same name.
    `SparklePlugin.labelled("late")` adds another instance to a run: `sparkle@late`.
    The line `config_class = SparkleConfig` lets mypy check `SparklePlugin(size=1.0)`; pyright and
    editors do so without it.

    Args:
        config: the settings as an object; or pass them as keywords: `SparklePlugin(size=1.0)`.

    Raises:
        ConfigError: a setting is unknown, missing or of the wrong type.
    """

    label: ClassVar[str] = ""  # distinguishes several instances of the plugin in one run
    before: ClassVar[tuple[str, ...]] = ()  # plugins that must come after this one, if present
    after: ClassVar[tuple[str, ...]] = ()  # plugins that must come before this one, if present
    requires: ClassVar[tuple[str, ...]] = ()  # plugins that must be present
    conflicts: ClassVar[tuple[str, ...]] = ()  # plugins that must be absent
    api_version: ClassVar[str] = "1.0"  # hook version it was built for; see docs/plugin_api.md
    topology_invariant: ClassVar[bool] = True  # in cells: same bits for any number of ranks
    slot: ClassVar[str | None] = None  # a role for one plugin of a run: "lr", "model"
    state_version: ClassVar[int] = 1  # layout version of `state_dict`; see `migrate`

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.name = cls.__dict__.get("name") or name_of(cls.__name__)
        describe(cls, _Configured)

    @classmethod
    def labelled(cls, label: str) -> type[Self]:
        """The class of another instance: `sparkle`, `sparkle@late`, `sparkle@again` in one run.

        Each has its own settings, state and name. What other plugins declare about `sparkle`, such
        as to come before it, applies to all of them.

        Args:
            label: letters, digits and underscores.

        Raises:
            PluginError: it is something else.
        """
        if not re.fullmatch(r"[A-Za-z0-9_]+", label):
            raise PluginError(
                f"'{cls.name}@{label}': a label has letters, digits and underscores, such as "
                f"{cls.name}@late"
            )
        return type(
            cls.__name__,
            (cls,),
            {
                **{key: getattr(cls, key) for key in ("__module__", "__qualname__")},
                "__doc__": vars(cls).get("__doc__"),
                "name": f"{cls.name}@{label}",
                "label": label,
            },
        )

    if TYPE_CHECKING:

        def __new__(
            cls: type[Configured[P, Made_co]],
            config: ConfigT | None = None,
            /,
            *args: P.args,
            **settings: P.kwargs,
        ) -> Made_co:
            """Takes its settings by name; `help()` of the class describes them."""

    def state_dict(self) -> StateDict:
        """What this plugin needs for a resumed run to continue bitwise."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what `state_dict` returned."""

    def migrate(self, state: StateDict, from_version: int) -> StateDict:
        """Convert a state of an older `state_version` to the current layout."""
        raise CheckpointError(
            f"plugin '{self.name}' cannot read its state of version {from_version}; it expects "
            f"version {self.state_version}. Install the release that wrote the checkpoint."
        )


def name_of(class_name: str) -> str:
    """The plugin name for a class name: `SlowFadePlugin` is `slow_fade`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name.removesuffix("Plugin")).lower()


def _storable(value: Any) -> Any:
    """The value without pydantic's placeholders for secrets, as JSON can represent it."""
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items() if item != _SECRET}
    if isinstance(value, list):
        return [_storable(item) for item in value if item != _SECRET]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def config_error(error: ValidationError, prefix: str, model: type[BaseModel]) -> ConfigError:
    """One line per error: which key is wrong, what it got and what it expects."""
    faults = error.errors(include_url=False)
    lines = [_line(fault, prefix, model) for fault in faults[:10]]
    if more := len(faults) - len(lines):
        lines.append([f"and {more:,} more"])
    return ConfigError(*[part for line in lines for part in ("\n", *line)][1:])


def _line(fault: ErrorDetails, prefix: str, model: type[BaseModel]) -> list[object]:
    """What is wrong with one key, as parts of a message."""
    key = ".".join(map(str, (prefix, *fault["loc"]) if prefix else fault["loc"]))
    if fault["type"] == "extra_forbidden":
        known = list(model.model_fields) if len(fault["loc"]) == 1 else []
        listed = (
            "Known: " + ", ".join(known) if len(known) < 13 else f"All: nexus-plugins show {prefix}"
        )
        return [
            f"unknown key '{key}'.",
            suggestion(str(fault["loc"][-1]), known),
            f" {listed}." if known else "",
        ]
    cause = fault.get("ctx", {}).get("error")
    said = [fault["msg"].removeprefix("Value error, ").replace("valid tuple", "list")]
    first, *hints = cause.args if isinstance(cause, NexusError) else said
    return [f"{key}: ", *_got(fault, model), first[:1].lower() + first[1:], *hints]


def _got(fault: ErrorDetails, model: type[BaseModel]) -> list[object]:
    """The wrong value, unless it is secret, a whole block, or in the message anyway."""
    secret = {name for name, f in model.model_fields.items() if "Secret" in str(f.annotation)}
    value, place = fault["input"], fault["loc"]
    known = isinstance(value, str | None) and repr(value) in fault["msg"]
    if known or fault["type"] == "missing" or (isinstance(value, dict) and not place):
        return []
    return ["got ", "a secret" if secret & {*place[:1]} else hint_value(value), "; "]
