"""Every error that the trainer raises on purpose.

A message says what was wrong, what was got, what was expected and how to mend it. The command
line turns a `NexusError` into one line and an exit code; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NexusError",
    "PluginError",
    "RunError",
    "suggestion",
]


class NexusError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 2


class ConfigError(NexusError):
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
    close = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
