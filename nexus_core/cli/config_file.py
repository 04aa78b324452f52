"""Config files: YAML, TOML or JSON, in any Unicode encoding."""

from __future__ import annotations

import codecs
import json
import tomllib
from datetime import date, time
from pathlib import Path
from typing import Any

from nexus_core.cli import yaml12
from nexus_core.cli.yaml12 import Document
from nexus_core.errors import ConfigError, suggestion

__all__ = ["is_config_file", "read_config_file"]

SUFFIXES = (".yaml", ".yml", ".toml", ".json")
MOST_BYTES = 2**20
_MARKS = (  # longest first: that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_config_file(name: str) -> bool:
    """Whether a name is a config file's; otherwise it may be a preset's."""
    return Path(name).suffix.lower() in SUFFIXES


def read_config_file(path: Path) -> Document:
    """Read a config file.

    Returns:
        A mapping with text keys, and how its YAML wrote values that are not text.

    Raises:
        ConfigError: it cannot be read, is not valid, repeats a key, or is not a mapping.
    """
    text, kind = _read(path), path.suffix.lower().removeprefix(".")
    try:
        if kind == "toml":
            document = Document(_plain(tomllib.loads(text)))
        elif kind == "json":
            document = Document(_plain(json.loads(text, object_pairs_hook=_unique)))
        else:
            document = yaml12.parse(text)
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"the config file '{path}' is not valid {kind}: {said}") from None
    if not isinstance(document.value, dict) or not document.value:
        got = "nothing" if not document.value else type(document.value).__name__
        raise ConfigError(f"the config file '{path}' holds {got}; expected keys such as 'until:'")
    return document


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        beside = [file.name for file in path.parent.glob("*") if is_config_file(file.name)]
        near = "" if path.exists() else suggestion(path.name, beside)
        raise ConfigError(f"cannot read the config file '{path}': {reason}.{near}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"cannot read the config file '{path}': it is larger than {MOST_BYTES:,} bytes"
        )
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"cannot read the config file '{path}': line {line} is not UTF-8 text; save it as UTF-8"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key '{twice}'; keep one")
    return found


def _plain(value: Any, depth: int = 0) -> Any:
    """Values that all formats share, in place: TOML dates become text."""
    if depth > yaml12.DEEPEST:
        raise ValueError(f"nested deeper than {yaml12.DEEPEST} levels")
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _plain(item, depth + 1)
    return value.isoformat() if isinstance(value, date | time) else value
