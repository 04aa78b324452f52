"""Plugins that show or store metrics, and may fail without stopping a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar

from nexus_core.errors import ConfigError
from nexus_core.plugin import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Logger", "LoggerConfig"]


class LoggerConfig(PluginConfig):
    """Settings that every logger has."""


LoggerConfigT = TypeVar("LoggerConfigT", bound=LoggerConfig)


class Logger(Plugin[LoggerConfigT]):
    """A plugin that shows or stores metrics, and that may fail without stopping the run.

    Answer `open`, `write` and `close` instead of hooks. Only the main process calls them. A
    failure is a warning; after three in a row the logger is switched off for the rest of the run.
    """

    writes_files: ClassVar[bool] = False  # into the run's folder, which must then be there
    FAILURES_ALLOWED: ClassVar[int] = 3
    failures: int = 0  # in a row, so far

    def open(self, engine: Engine) -> None:
        """Prepare to write; the run starts, or goes on, at `engine.state.step`."""

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics, by name, as they are at `engine.state.step`."""
        raise NotImplementedError(f"{type(self).__name__}.write")

    def write_evaluation(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics of an evaluation; the same as `write` unless overridden."""
        self.write(engine, metrics)

    def close(self, engine: Engine) -> None:
        """Finish writing; the run is over, well or not."""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Open it.

        Raises:
            ConfigError: it writes files, and the engine has no `out`.
        """
        if self.writes_files and engine.out is None:
            raise ConfigError(
                f"{self.name} writes into the run's folder, and there is none; give it, as in "
                'Engine(..., out="runs/mine"), or leave the plugin out'
            )
        self._attempt("open", engine)

    @hookimpl
    def on_log(self, engine: Engine, metrics: dict[str, float]) -> None:
        self._attempt("write", engine, metrics)

    @hookimpl
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        self._attempt("write_evaluation", engine, metrics)

    @hookimpl
    def on_close(self, engine: Engine) -> None:
        self._attempt("close", engine)

    def _attempt(self, action: str, engine: Engine, *arguments: Mapping[str, float]) -> None:
        if not engine.ranks.is_main or self.failures >= self.FAILURES_ALLOWED:
            return
        try:
            getattr(self, action)(engine, *arguments)
            self.failures = 0
        except Exception as error:  # a logger must never end a run of weeks
            self.failures += 1
            end = "it is switched off" if self.failures == self.FAILURES_ALLOWED else "going on"
            warnings.warn(
                f"logger '{self.name}' failed to {action} at step {engine.state.step} "
                f"({type(error).__name__}: {error}); {end}",
                RuntimeWarning,
                stacklevel=2,
            )
