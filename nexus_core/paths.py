"""Paths as people write them in settings: `~` and variables stand for what a shell puts there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from nexus_core.errors import ConfigError

__all__ = ["PathField", "PathText", "expanded"]

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expanded(path: str | Path) -> str:
    """Put the home folder in place of a leading `~`, and values in place of `$NAME` and `${NAME}`.

    A name in small letters that is no variable stays, as it may be a part of the path's name.

    Raises:
        ConfigError: a variable is not set, there is no home folder, or no path is like that.
    """
    text = _VARIABLE.sub(_value, str(path))
    if not text or "\0" in text:
        raise ConfigError("a path is not empty, and holds no NUL character")
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
                "there is no home folder for '~'; set HOME, or write the path in full"
            ) from None
        return text  # no user has this name, so it is the path's own


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name in os.environ:
        return os.environ[name]
    if name.isupper():
        raise ConfigError(f"the variable {match[0]} is not set; set it, or write the path in full")
    return match[0]


def _path(value: object) -> object:
    return Path(expanded(value)) if isinstance(value, str | Path) else value


PathField = Annotated[Path, BeforeValidator(_path)]
"""The type of a config field that holds a path."""

PathText = Annotated[str, AfterValidator(expanded)]
"""The same where the path is kept as text."""
