"""Every error that the trainer raises on purpose: what, what was got, what fixes it.

The command line turns a `NexusError` into one line and an exit code; `--debug` shows the traceback.
"""

import difflib
from collections.abc import Iterable


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
