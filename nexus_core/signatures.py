"""A plugin's settings as shown by type checkers, editors, `help()` and notebooks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo

__all__ = ["Configured", "Lax", "Several", "Shown", "describe", "own_doc", "settings_lines"]

Given = TypeVar("Given")
P = ParamSpec("P")
Made_co = TypeVar("Made_co", covariant=True)

if TYPE_CHECKING:
    Lax: TypeAlias = Given | Any
    Several: TypeAlias = Sequence[Given]
else:
    Lax = Annotated[Given, "lax"]
    Several = tuple[Given, ...]

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >="}
PLAIN = (bool, int, float, str, tuple, list, dict, NoneType)


class Configured(Protocol[P, Made_co]):
    """The type of a plugin class: its constructor takes what its config class takes."""

    @property
    def config_class(self) -> Callable[P, BaseModel]:
        """The class of its settings."""

    def labelled(self, label: str) -> type[Made_co]:
        """The class of a further instance; its return type is that of the constructor."""


@dataclass(frozen=True)
class Spelling:
    """How a language spells None and other values."""

    none: str
    value: Callable[[Any], str]


PYTHON = Spelling("None", lambda value: repr(_plain(value)))
YAML = Spelling("null", lambda value: json.dumps(value, default=str))


class Shown(str):
    """A type as text, shown without quotes in signatures."""

    __repr__ = str.__str__


class SettingsSignature:
    """The signature of a plugin class: its settings as keyword arguments."""

    def __get__(self, plugin: object, cls: Any) -> inspect.Signature:
        return inspect.Signature(
            [
                inspect.Parameter(
                    key,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if f.is_required() else _plain(_default(f)),
                    annotation=Shown(_type(f.annotation, PYTHON)),
                )
                for key, f in cls.config_class.model_fields.items()
            ]
        )


@dataclass(frozen=True)
class Described:
    """The docstring of a plugin class, followed by its settings.

    Args:
        text: the author's docstring.
    """

    text: str

    def __get__(self, plugin: object, cls: Any) -> str:
        settings = list(settings_lines(cls.config_class, "    ", PYTHON))
        if not settings:
            return self.text
        return "\n".join([inspect.cleandoc(self.text), "", "Settings:", *settings])


def describe(cls: Any, base: Any) -> None:
    """Give a plugin class its `config_class`, and a signature and docstring with its settings.

    Args:
        base: the class whose constructor takes settings; other constructors keep their signature.
    """
    for argument in (one for of in vars(cls).get("__orig_bases__", ()) for one in get_args(of)):
        if isinstance(argument, type) and issubclass(argument, base.config_class):
            cls.config_class = vars(cls).get("config_class", argument)
    cls.__signature__ = SettingsSignature() if cls.__init__ is base.__init__ else None
    if isinstance(doc := vars(cls).get("__doc__"), str):
        cls.__doc__ = Described(doc)


def own_doc(cls: type) -> str:
    """The author's docstring of a class, or an empty string."""
    doc = vars(cls).get("__doc__")
    return doc.text if isinstance(doc, Described) else doc or ""


def settings_lines(
    model: type[BaseModel],
    indent: str = "  ",
    spelling: Spelling = YAML,
    around: tuple[type[BaseModel], ...] = (),
) -> Iterator[str]:
    """Two lines per field, followed by the lines of nested settings that are not shown `around`."""
    for key, field in model.model_fields.items():
        kind = " ".join([_type(field.annotation, spelling), *_bounds(field)])
        default = (
            "required" if field.is_required() else f"default {spelling.value(_default(field))}"
        )
        yield f"{indent}{key}: {kind}, {default}"
        yield f"{indent}    {field.description or 'no description'}"
        outer = (*around, model)
        for block in (found for found in _blocks(field.annotation) if found not in outer):
            yield f"{indent}    {block.__name__}"
            yield from settings_lines(block, indent + "      ", spelling, outer)


def _default(field: FieldInfo) -> Any:
    return (
        Shown("computed")
        if field.default_factory_takes_validated_data
        else field.get_default(call_default_factory=True)
    )


def _plain(value: Any) -> Any:
    """A value as a user writes it: an interval as text."""
    return value if isinstance(value, PLAIN) else str(value)


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _blocks(argument)


def _bounds(field: FieldInfo) -> Iterator[str]:
    for rule in field.metadata:
        for name, sign in BOUNDS.items():
            if (value := getattr(rule, name, None)) is not None:
                yield f"{sign} {value}"


def _type(annotation: Any, spelling: Spelling) -> str:
    """A type as a user writes it: `float`, `Interval | None`, `'min' | 'max'`, `list[str]`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], spelling)
    if origin in (Union, UnionType):
        return " | ".join(_type(argument, spelling) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is not None:
        inner = ", ".join(_type(argument, spelling) for argument in arguments)
        return f"{_type(origin, spelling)}[{inner}]"
    if annotation in (None, NoneType, ...):
        return "..." if annotation is ... else spelling.none
    return getattr(annotation, "__name__", str(annotation))
