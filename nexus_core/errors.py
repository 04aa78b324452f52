"""Every error that the trainer raises on purpose: what, what was got, how to fix it.

The command line turns a `NexusError` into one line and an exit code; `--debug` shows the traceback.
"""

import difflib
import json
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class NexusError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 2


class ConfigError(NexusError, ValueError):
    """A setting is unknown, of the wrong type or impossible beside another."""


class PluginError(NexusError):
    """A plugin cannot be found, loaded, checked or ordered."""


class DataError(NexusError):
    """The training or evaluation data cannot be read or used."""


class CheckpointError(NexusError):
    """A checkpoint is missing, damaged, or does not fit this run."""


class RunError(NexusError):
    """A run that had started cannot go on."""

    exit_code = 1


def suggestion(got: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" when a known name is close to `got`, else an empty string."""
    close = difflib.get_close_matches(got, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


# A hint on how to fix a mistake is in the words of the place where it was made: options of a
# command, or Python. The commands say so, once, around all that they do.
_on_command_line = False


@contextmanager
def hints_for_command_line() -> Iterator[None]:
    """Word hints as options of the commands for as long as the context lasts."""
    global _on_command_line  # of the process, as a thread that writes a checkpoint hints as well
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def hint_set(key: str, value: object) -> str:
    """How to give a setting a value: `--set sparkle.size=1`, or `SparklePlugin(size=1)`."""
    plain = value if isinstance(value, int | float | list | dict) else str(value)
    if _on_command_line:
        text = plain if isinstance(plain, str) else json.dumps(plain)
        return f"--set {key}={shlex.quote(text)}"
    plugin, dot, name = key.rpartition(".")
    return f"{_class_of(plugin)}({name}={plain!r})" if dot else f"{key}={plain!r}"


def hint_add(*plugins: str) -> str:
    """How to add plugins: `--plugins dew,glow`, or `plugins=[..., DewPlugin(), GlowPlugin()]`."""
    if _on_command_line:
        return f"--plugins {','.join(plugins)}"
    return f"plugins=[..., {', '.join(f'{_class_of(name)}()' for name in plugins)}]"


def hint_leave_out(plugin: str) -> str:
    """How to leave a plugin out: `--plugins no:glow`, or `drop GlowPlugin() from plugins=[...]`."""
    if _on_command_line:
        return f"--plugins no:{plugin}"
    return f"drop {_class_of(plugin)}() from plugins=[...]"


def hint_resume(source: str = "auto") -> str:
    """How to resume: `--resume auto`, or `engine.resume('auto')`."""
    return f"--resume {source}" if _on_command_line else f"engine.resume({source!r})"


def hint_out(folder: str = "FOLDER") -> str:
    """How to choose the run's folder: `--out FOLDER`, or `Engine(..., out='FOLDER')`."""
    return f"--out {folder}" if _on_command_line else f"Engine(..., out={folder!r})"


def _class_of(plugin: str) -> str:
    words, _, label = plugin.partition("@")
    name = "".join(word.title() for word in words.split("_")) + "Plugin"
    return f"{name}.labelled({label!r})" if label else name
