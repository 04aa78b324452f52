"""Paths in settings: `~` and variables are expanded as in a shell."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from nexus_core.errors import ConfigError
from nexus_core.signatures import Lax

__all__ = ["PathField", "PathText", "expanded"]

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expanded(path: str | Path) -> str:
    """Expand a leading `~`, `$NAME` and `${NAME}`.

    A lower-case name that is not a variable stays, as it may be part of the path.

    Raises:
        ConfigError: a variable is not set, there is no home folder, or the path is invalid.
    """
    text = _VARIABLE.sub(_value, str(path))
    if not text or "\0" in text:
        raise ConfigError("a path must not be empty or contain a NUL character")
    if not text.startswith("~"):
        return text
    own = text == "~" or text.startswith("~/")
    try:
        if own and os.environ.get("HOME") == "":
            raise RuntimeError
        return str(Path(text).expanduser())
    except RuntimeError:
        if own:
            raise ConfigError(
                "no home folder for '~'; set HOME, or write the path in full"
            ) from None
        return text  # no such user, so `~` is part of the name


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name in os.environ:
        return os.environ[name]
    if name.isupper():
        raise ConfigError(f"the variable {match[0]} is not set; set it, or write the path in full")
    return match[0]


def _path(value: object) -> object:
    return Path(expanded(value)) if isinstance(value, str | Path) else value


PathField = Annotated[Lax[Path], BeforeValidator(_path)]
"""The type of a config field for a path."""

PathText = Annotated[str, AfterValidator(expanded)]
"""The same, keeping the path as text."""
