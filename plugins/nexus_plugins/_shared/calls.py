"""Call what a setting names by import path, with arguments checked in advance."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

import torch
from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

from nexus_core import places
from nexus_core.errors import ConfigError, NexusError, suggestion
from nexus_core.plugin import PluginConfig

__all__ = ["Arguments", "Call", "Callee", "as_json", "callee", "check_arguments", "takes"]

Arguments: TypeAlias = dict[str, JsonValue]
_PLAIN = (bool, int, float, str, NoneType, Path, Any)
_CONTAINERS = (list, tuple, dict, set, frozenset, Sequence, Mapping, Union, UnionType, Literal)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Call(PluginConfig):
    """A function or class by import path, with arguments; a bare path has none."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"]})
    call: places.PlaceField = Field(
        min_length=1, description="function or class: ./file.py:name or package.module:name"
    )
    args: Arguments = Field(default={}, description="its arguments, by name")

    @model_validator(mode="before")
    @classmethod
    def _place_alone(cls, given: object) -> object:
        return given if isinstance(given, dict) else {"call": given}

    @field_validator("call", mode="before")
    @classmethod
    def _place_of(cls, given: object) -> object:
        """Represent a function or class given in code by its import path, as in a config."""
        if not callable(given) or not hasattr(given, "__qualname__"):
            return given
        if not given.__qualname__.replace(".", "").isidentifier():
            raise ValueError(
                f"{given.__qualname__} is not defined at module level; name one that is"
            )
        return f"{given.__module__}:{given.__qualname__}"

    @field_validator("args", mode="before")
    @classmethod
    def _as_json(cls, given: object) -> object:
        return as_json(given)


def as_json(value: object) -> object:
    """The config-file form of a Python value: a list for a tuple."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Callee:
    """A function or class that a setting names.

    Args:
        function: the function or class.
        place: its import path, as in the setting.
        key: the setting, for messages.
        args: its arguments by name, checked against its signature.
    """

    function: Callable[..., Any]
    place: str
    key: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *given: object) -> Any:
        """Call it; a note on errors names the setting."""
        with self._named():
            return self.function(*given, **self.args)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except NexusError:
            raise
        except Exception as error:
            error.add_note(f"{self.key}: {self.place}{self._line_of(error)}")
            raise

    def _line_of(self, error: Exception) -> str:
        """The line of the function's file that an error comes from."""
        module = sys.modules.get(getattr(self.function, "__module__", ""))
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == getattr(module, "__file__", None)]
        return f", line {lines[-1]}" if lines else ""


def callee(key: str, call: Call, given: Sequence[str] = (), *, prefix: str = "args") -> Callee:
    """Load what a setting names, and check the arguments against its signature.

    Args:
        key: the setting, such as "model".
        call: its value.
        given: the leading arguments that the trainer passes, in words, for messages.
        prefix: key of the arguments within the setting; empty: next to `call`.

    Raises:
        ConfigError: it cannot be loaded or called, or an argument is unknown, missing or does not
            match its annotation.
    """
    found, place = located(key, call.call), places.shown(call.call)
    where = f"{key}.{prefix}" if prefix else key
    args = check_arguments(found, place, call.args, where, given)
    return Callee(found, place, key, args)


def check_arguments(
    function: Callable[..., Any],
    place: str,
    args: Arguments,
    key: str,
    given: Sequence[str] = (),
    *,
    whole: bool = True,
) -> dict[str, Any]:
    """Check arguments against a signature.

    Args:
        function: the function whose signature it is.
        place: its import path, as in the setting.
        args: the arguments by name, as in a config file.
        key: the setting that contains them.
        given: the leading arguments that the trainer passes, in words.
        whole: whether arguments without a default are required.

    Returns:
        The arguments, converted to their annotated types: a list to a tuple, or a list of numbers
        to a tensor.

    Raises:
        ConfigError: one is unknown, missing or of another type.
    """
    parameters = parameters_of(function)
    if parameters is None:
        return dict(args)
    own = _without_given(parameters, given, place, key)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in own.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in args:
        if name not in named and not open_ended:
            taken = f"It takes: {', '.join(named) or 'nothing'}"
            said = f"{place} has no argument '{name}'.{suggestion(name, named)} {taken}"
            if name in parameters:
                said = f"the trainer passes '{name}' to {place}; remove it"
            raise ConfigError(f"unknown key '{key}.{name}': {said}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in args]
    if missing and whole:
        raise ConfigError(
            f"{place} needs its argument '{missing[0]}', which has no default; set "
            f"{key}.{missing[0]}"
        )
    return {
        name: _fitting(named[name].annotation, value, f"{key}.{name}", f"'{name}' of {place}")
        if name in named
        else value
        for name, value in args.items()
    }


def takes(function: Callable[..., Any], place: int, *names: str) -> bool:
    """Whether the positional parameter at an index has one of the given names."""
    positional = [p for p in (parameters_of(function) or {}).values() if p.kind in _POSITIONAL]
    return len(positional) > place and positional[place].name in names


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a function or class, by name; None: unknown."""
    try:
        return inspect.signature(function, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, ValueError, SyntaxError, ImportError):
        pass  # annotations only for type checkers, or no signature
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):
        return None


def located(key: str, place: str) -> Callable[..., Any]:
    """Import the function or class at a path.

    Raises:
        ConfigError: there is nothing callable at the path.
    """
    try:
        found = places.load(place)
    except ConfigError as error:
        raise ConfigError(f"{key}.call: {error}") from error
    if isinstance(found, ModuleType):
        own = [n for n, v in vars(found).items() if getattr(v, "__module__", "") == found.__name__]
        raise ConfigError(
            f"{key}.call: {places.shown(place)} is a whole module; name what to call in "
            f"it, such as {places.shown(place)}:{own[0] if own else 'NAME'}"
        )
    if isinstance(found, nn.Module) or not callable(found):
        raise ConfigError(
            f"{key}.call: {places.shown(place)} is a {type(found).__name__}; name a function or a "
            "class"
        )
    return found


def _without_given(
    parameters: Mapping[str, inspect.Parameter], given: Sequence[str], place: str, key: str
) -> dict[str, inspect.Parameter]:
    """The parameters that are left for the settings."""
    positional = [name for name, p in parameters.items() if p.kind in _POSITIONAL]
    if len(positional) < len(given) and not any(
        p.kind is p.VAR_POSITIONAL for p in parameters.values()
    ):
        raise ConfigError(
            f"{key.partition('.')[0]}: {place} is called with ({', '.join(given)}), but takes "
            f"({', '.join(parameters)}); give it {len(given)} positional parameters"
        )
    taken = set(positional[: len(given)])
    return {name: p for name, p in parameters.items() if name not in taken}


def _fitting(annotation: Any, value: JsonValue, key: str, whose: str) -> Any:
    """The value, converted to the annotated type if that is simple."""
    union = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    if isinstance(value, list) and Tensor in (annotation, *union):
        try:
            return torch.tensor(value, dtype=torch.get_default_dtype())
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key}: got {value!r:.80}; {whose} is a tensor: {error}") from None
    if not _is_simple(annotation):
        return value
    try:
        return TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        said = fault["msg"][:1].lower() + fault["msg"][1:]
        raise ConfigError(
            f"{key}: got {value!r:.80}; {whose} is {_written(annotation)}: {said}"
        ) from None


def _is_simple(annotation: Any) -> bool:
    """Whether pydantic reads the annotation as Python does: plain types, and containers of them."""
    origin = get_origin(annotation)
    if origin is Literal or annotation in _PLAIN:
        return True
    if origin is None:
        return isinstance(annotation, type) and (
            annotation in _CONTAINERS or issubclass(annotation, Enum) or is_dataclass(annotation)
        )
    return origin in _CONTAINERS and all(
        part is Ellipsis or _is_simple(part) for part in get_args(annotation)
    )


def _written(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
