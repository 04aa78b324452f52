"""Validate settings against their model, by rules that all models share.

If a plugin wants text and YAML read a number, it gets the text as written. A boolean is not a
number, and an integer must fit in 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ValidationError

from nexus_core.cli.yaml12 import Path
from nexus_core.errors import ConfigError

__all__ = ["check_numbers", "fitted", "from_variables"]

Block = dict[str, Any]
WANTS_TEXT = ("string_type", "path_type")
WANTS_VALUES = ("list_type", "tuple_type", "dict_type", "model_type", "model_attributes_type")
ROUNDS = 20


def fitted(model: type[BaseModel], given: Block, written: Mapping[Path, str]) -> Block:
    """The settings, with text as written wherever the model wants text.

    A `run_name` of `007` stays `007`, and a `sep_token` of `[SEP]` stays that token.

    Args:
        model: the model that validates the settings.
        given: settings by key.
        written: how values that are not text were written, by their path in `given`.
    """
    if not written:
        return given
    for _ in range(ROUNDS):
        try:
            model.model_validate(given)
        except ValidationError as error:
            found = dict(_misread(error, given, written))
            if not found:
                return given
            given = deepcopy(given)
            deepest = max(map(len, found))  # items of a list before the list itself
            for place, text in found.items():
                if len(place) == deepest:
                    _at(given, place[:-1])[place[-1]] = text
        else:
            return given
    return given


def _misread(
    error: ValidationError, given: Block, written: Mapping[Path, str]
) -> Iterator[tuple[Path, str]]:
    faults = error.errors(include_url=False, include_context=True)
    kinds = [(_place(given, fault["loc"]), fault["type"]) for fault in faults]
    for fault, (place, _) in zip(faults, kinds, strict=True):
        text, value = written.get(place), _at(given, place)
        if text is None or isinstance(value, str):
            continue
        if isinstance(value, dict | list) and any(_is_within(place, *kind) for kind in kinds):
            continue  # a block with an invalid setting is not text
        expected = str(fault.get("ctx", {}).get("expected"))
        if fault["type"] in WANTS_TEXT or (
            fault["type"] in ("literal_error", "enum") and repr(text) in expected
        ):
            yield place, text


def _is_within(place: Path, other: Path, kind: str) -> bool:
    """Whether an error is below this path, or says that the value here is not a list or block."""
    return other[: len(place)] == place and (len(other) > len(place) or kind in WANTS_VALUES)


def _place(given: Any, location: tuple[str | int, ...]) -> Path:
    """The path of an error; pydantic inserts the names of union members."""
    place: list[str | int] = []
    for part in location:
        in_dict = isinstance(given, dict) and part in given
        if in_dict or (isinstance(given, list) and isinstance(part, int) and part < len(given)):
            given = given[part]
            place.append(part)
    return tuple(place)


def _at(given: Any, place: Path) -> Any:
    for part in place:
        given = given[part]
    return given


def check_numbers(prefix: str, checked: BaseModel, given: Block) -> None:
    """Reject numbers that would be misread.

    Args:
        prefix: prefix of the keys in messages.
        checked: the settings validated from `given`.
        given: by key.

    Raises:
        ConfigError: a boolean is given for a number, or an integer needs more than 64 bits.
    """
    settings = checked.model_dump(include=set(type(checked).model_fields) - {"plugins"})
    truths = {place for place, value in _leaves(given) if isinstance(value, bool)}
    for place, value in _leaves(settings):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        key = ".".join(map(str, ((prefix, *place) if prefix else place)))
        if place in truths:
            raise ConfigError(f"{key}: got {str(bool(value)).lower()}; expected a number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{key}: got {value!r:.60}; expected an integer of up to 64 bits")


def from_variables(error: ConfigError, variables: Mapping[str, str]) -> ConfigError:
    """The same error, naming the environment variable that a wrong setting comes from.

    Args:
        error: one or more lines that begin with keys.
        variables: variable names by key.
    """
    lines = error.on_command_line().split("\n")
    if not any(line.startswith(f"{key}:") for line in lines for key in variables):
        return error
    places = [next((key for key in variables if line.startswith(f"{key}:")), "") for line in lines]
    return ConfigError("\n".join(
        f"{line} (from {variables[key]})" if key else line
        for line, key in zip(lines, places, strict=True)
    ))  # fmt: skip


def _leaves(value: Any, place: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*place, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*place, index))
    else:
        yield place, value
