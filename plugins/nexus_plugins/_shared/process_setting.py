"""Process-wide settings that several runs may need at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from nexus_core import ConfigError

__all__ = ["ProcessSetting"]

T = TypeVar("T")


class ProcessSetting(Generic[T]):
    """A process-wide setting, changed while at least one run holds it.

    The first run to hold it saves the previous value and the last one to release it restores that,
    in whichever order they end. Like the setting, the count is process-wide.

    Args:
        name: the setting's name in messages.
        read: returns its value.
        write: sets it.
    """

    def __init__(self, name: str, read: Callable[[], T], write: Callable[[T], object]) -> None:
        self._name, self._read, self._write = name, read, write
        self._runs = 0
        self._held: T
        self._before: T

    def hold(self, value: T) -> Callable[[], None]:
        """Set it to `value` for a run; returns a function that releases it, to be called once.

        Raises:
            ConfigError: another run of this process holds it with another value.
        """
        if self._runs == 0:
            self._before, self._held = self._read(), value
        elif value != self._held:
            raise ConfigError(
                f"{self._name} is {self._held!r} for another run of this process, and this one "
                f"needs {value!r}; use the same settings for both, or separate processes"
            )
        self._write(value)
        self._runs += 1
        return self._release

    def _release(self) -> None:
        self._runs -= 1
        if self._runs == 0:
            self._write(self._before)
