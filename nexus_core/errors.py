"""Errors that the trainer raises on purpose: what is wrong, what was given, how to fix it.

The command line turns a `NexusError` into one line and an exit code; `--debug` shows the traceback.
"""

import difflib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hint:
    """How to fix a mistake, worded for the command line and for Python.

    Args:
        command: as a command-line option.
        python: the same in Python.
    """

    command: str
    python: str

    def __str__(self) -> str:
        return self.python


class NexusError(Exception):
    """Base of all errors whose message is meant for the user.

    The message is given in parts: text and `Hint`s. In Python it shows the Python hints; the
    commands show theirs.
    """

    exit_code = 2

    def __str__(self) -> str:
        return "".join(map(str, self.args))

    def on_command_line(self) -> str:
        """The message, with hints as command-line options."""
        return "".join(p.command if isinstance(p, Hint) else str(p) for p in self.args)


class ConfigError(NexusError, ValueError):
    """A setting is unknown, of the wrong type or incompatible with another."""


class PluginError(NexusError):
    """A plugin cannot be found, loaded, checked or ordered."""


class DataError(NexusError):
    """The training or evaluation data cannot be read or used."""


class CheckpointError(NexusError):
    """A checkpoint is missing, damaged, or does not fit this run."""


class RunError(NexusError):
    """A run that had started cannot continue."""

    exit_code = 1


def suggestion(got: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" when a known name is close to `got`, else an empty string."""
    close = difflib.get_close_matches(got, list(known), 1, cutoff=0.75 if "." in got else 0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def hint_set(key: str, value: object) -> Hint:
    """How to give a setting a value: `--set sparkle.size=1`, or `SparklePlugin(size=1)`."""
    plain = value if isinstance(value, int | float | list | dict) else str(value)
    text = plain if isinstance(plain, str) else json.dumps(plain)
    plugin, dot, name = key.rpartition(".")
    python = f"{name}={plain!r}"
    return Hint(
        f"--set {key}={shlex.quote(text)}", f"{_class_of(plugin)}({python})" if dot else python
    )


def hint_value(value: Any) -> Hint:
    """A wrong value as it was given: `nothing` or `None`; of a tensor only the shape and dtype."""
    shape: Any = getattr(value, "shape", None)
    shown = (
        f"shape {tuple(shape)}, {value.dtype}"
        if isinstance(shape, tuple) and shape
        else f"{value!r:.200}"
    )
    return Hint({"None": "nothing", "True": "true", "False": "false"}.get(shown, shown), shown)


def hint_add(*plugins: str) -> Hint:
    """How to add plugins: `--plugins dew,glow`, or `plugins=[..., DewPlugin(), GlowPlugin()]`."""
    made = ", ".join(f"{_class_of(name)}()" for name in plugins)
    return Hint(f"--plugins {','.join(plugins)}", f"plugins=[..., {made}]")


def hint_leave_out(plugin: str) -> Hint:
    """How to remove a plugin: `--plugins no:glow`, or `drop GlowPlugin() from plugins=[...]`."""
    return Hint(f"--plugins no:{plugin}", f"drop {_class_of(plugin)}() from plugins=[...]")


def hint_resume(source: str = "auto") -> Hint:
    """How to resume: `--resume auto`, or `engine.resume('auto')`."""
    return Hint(f"--resume {source}", f"engine.resume({source!r})")


def hint_out(folder: str = "FOLDER") -> Hint:
    """How to choose the run folder: `--out FOLDER`, or `Engine(..., out='FOLDER')`."""
    return Hint(f"--out {folder}", f"Engine(..., out={folder!r})")


def _class_of(plugin: str) -> str:
    words, _, label = plugin.partition("@")
    name = "".join(word.title() for word in words.split("_")) + "Plugin"
    return f"{name}.labelled({label!r})" if label else name
