"""User-written paths: `~`, environment variables, and safe display in a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from nexus_core.errors import DataError

__all__ = ["expanded", "of_setting", "printable", "reason"]

P = ParamSpec("P")
Value = TypeVar("Value")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def of_setting(key: str, read: Callable[P, Value], *args: P.args, **named: P.kwargs) -> Value:
    """Read what a setting names; errors about it begin with the setting.

    Args:
        key: the setting, such as `sparkle.file`.
        read: called with the other arguments.
    """
    try:
        return read(*args, **named)
    except DataError as error:
        raise DataError(f"{key}: ", *error.args) from error


def expanded(wish: str | Path) -> Path:
    """The path with `~` and `$NAME` replaced, unless it exists as written.

    Raises:
        DataError: a variable is not set, or there is no such user.
    """
    path = Path(wish)
    text = str(path)
    if "\0" in text:
        raise DataError(f"{text!r} is not a path: it has a null byte")
    if not re.search(r"[~$]", text) or os.path.lexists(path):
        return path
    for match in _VARIABLE.finditer(text):
        if match[1] not in os.environ:
            raise DataError(
                f"cannot use the path '{text}': the environment variable {match[1]} is not set; "
                "set it, or write the path in full"
            )
    found = Path(os.path.expandvars(text))
    try:
        return found.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"cannot use the path '{text}': no home folder for "
            f"'{found.parts[0]}'; write the path in full"
        ) from error


def printable(text: str) -> str:
    """The text with control characters and terminal sequences escaped."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def reason(error: BaseException) -> str:
    """The operating system's error message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
