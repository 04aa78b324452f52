"""What to write instead of a word that is neither a preset nor a config file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from nexus_core.cli.resumed import CONFIG
from nexus_core.errors import ConfigError, suggestion
from nexus_core.intervals import UNITS
from nexus_core.paths import expanded

__all__ = ["instead", "only_config"]


def only_config(words: Sequence[str], sets: Sequence[str]) -> str | None:
    """The config or preset that a command names; None: it names none.

    Args:
        words: words of the command that belong to no option.
        sets: as in each `--set`.

    Raises:
        ConfigError: it names several, or a value was not quoted.
    """
    unquoted = [word for word in words if _is_part_of_value(word)] if sets else []
    if len(words) < 2 and not unquoted:
        return words[0] if words else None
    stray = (unquoted or words[1:])[0]
    hint = _command(words[0]) or (stray and instead(stray))
    if unquoted or (
        sets and stray and not hint and stray not in entry_points(group="nexus.presets").names
    ):
        key, _, value = sets[-1].partition("=")
        whole = shlex.quote(f"{value.strip()} {' '.join(words[words.index(stray) :])}".strip())
        hint = f" A value with spaces needs quotes: --set {key}={whole}"
    raise ConfigError(f"unexpected '{stray}'; expected one config or preset.{hint}")


def instead(word: str) -> str:
    """The command that a word suggests, to follow an error; "" if it suggests none."""
    return next((f" {hint}" for hint in _hints(word)), "")


def _hints(word: str) -> Iterator[str]:
    path, quoted = Path(expanded(word)), shlex.quote(word)
    if os.path.isfile(path / CONFIG):  # noqa: PTH113 (no error for an odd name)
        again = shlex.quote(os.path.join(word, CONFIG))  # noqa: PTH118 (keeps what was written)
        yield (
            f"It is a run; to resume it: nexus-run resume {quoted}; to repeat it: "
            f"nexus-run {again} --out ANOTHER_FOLDER"
        )
    if word in entry_points(group="nexus.plugins").names:
        yield f"It is a plugin: nexus-run --plugins {word} (several without spaces: a,b)"
    if os.path.exists(path):  # noqa: PTH110 (likewise)
        yield (
            f"A plugin in a file: nexus-run --plugins {quoted}"
            if word.endswith(".py")
            else f"To train on it: nexus-run --set {_data()}.train={quoted}"
        )
    if word in entry_points(group="nexus.commands").names:
        yield f"A command comes first: nexus-run {word} ..."
    if near := _command(word):
        yield near.strip()
    if word in ("list", "show", "check", "new", "plugins"):
        yield "See: nexus-plugins --help"


def _command(word: str) -> str:
    known = [entry.name for entry in entry_points(group="nexus.commands")]
    near = suggestion(word, known)
    return near and f"{near} See: nexus-run --help"


def _data() -> str:
    """The plugin that reads the data of the default preset; "DATA" if it has none."""
    from nexus_core.cli.enabled import load_classes
    from nexus_core.cli.settings import read_settings

    classes = load_classes(read_settings(None).defaults, {})
    return next((name for name, plugin in classes.items() if plugin.slot == "data"), "DATA")


def _is_part_of_value(word: str) -> bool:
    """Whether it is a number or a unit of an interval, as in `until=2.5 epochs`."""
    unit = word.lower().removesuffix("s")
    return bool(word) and (word.replace(".", "", 1).isdigit() or (bool(unit) and unit in UNITS))
