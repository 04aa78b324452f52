"""Plugins that show or store metrics, and may fail without stopping a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar

from nexus_core.errors import ConfigError
from nexus_core.plugin import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.images import Image

__all__ = ["Logger", "LoggerConfig"]


class LoggerConfig(PluginConfig):
    """Settings that every logger has."""


LoggerConfigT = TypeVar("LoggerConfigT", bound=LoggerConfig)


class Logger(Plugin[LoggerConfigT]):
    """A plugin that shows or stores metrics, and that may fail without stopping the run.

    Answer `open`, `write` and `close` instead of hooks, and `write_note` and `write_image` where
    there is a place for text and for images. Only the main process calls them. A failure is a
    warning; after three in a row the logger is switched off for the rest of the run, and closed at
    its end. What failed is said once more at the end: a logger that answers `summarize` itself adds
    its lines to those of `super().summarize(engine)`. For a service that may be slow or hang, see
    `nexus_core.bases.background`.
    """

    writes_files: ClassVar[bool] = False  # into the run's folder, which must then be there
    only_watches: ClassVar[bool] = True  # its state need not be the same in two equal runs
    FAILURES_ALLOWED: ClassVar[int] = 3
    failures: int = 0  # in a row, so far
    failures_in_all: int = 0
    switched_off: bool = False
    _last_failure: str = ""

    def open(self, engine: Engine) -> None:
        """Prepare to write; the run starts, or resumes, at `engine.state.step`."""

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics, by name, as they are at `engine.state.step`."""
        raise NotImplementedError(f"{type(self).__name__}.write")

    def write_evaluation(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics of an evaluation; the same as `write` unless overridden."""
        self.write(engine, metrics)

    def write_note(self, engine: Engine, title: str, text: str) -> None:
        """Store a few words about the run as it is at `engine.state.step`; nothing unless answered.

        Args:
            title: what they are about, named as metrics are: `sensors/loss_explosion`.
            text: sentences, without Markdown, in one or more lines.
        """

    def write_image(self, engine: Engine, title: str, image: Image) -> None:
        """Store an image of the run as it is at `engine.state.step`; nothing unless answered.

        Args:
            title: what it shows, named as metrics are, and perhaps as one of them.
            image: as PNG, with its size and its caption, which may be empty.
        """

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
                f"{self.name} writes to the output folder, and this run has none; set one, as in "
                'Engine(..., out="runs/mine"), or remove the plugin'
            )
        self._attempt("open", engine)

    @hookimpl(stage="record")
    def on_log(self, engine: Engine, metrics: dict[str, float]) -> None:
        self._attempt("write", engine, metrics)

    @hookimpl(stage="record")
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        self._attempt("write_evaluation", engine, metrics)

    @hookimpl
    def on_note(self, engine: Engine, title: str, text: str) -> None:
        self._attempt("write_note", engine, title, text)

    @hookimpl
    def on_image(self, engine: Engine, title: str, image: Image) -> None:
        self._attempt("write_image", engine, title, image)

    @hookimpl
    def on_close(self, engine: Engine) -> None:
        self._attempt("close", engine)

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """What failed; nothing where all went well."""
        if not self.failures_in_all:
            return {}
        end = "; it was switched off" if self.switched_off else ""
        times = "once" if self.failures_in_all == 1 else f"{self.failures_in_all} times"
        return {f"logger {self.name}": f"failed {times}, last to {self._last_failure}{end}"}

    def _attempt(
        self, action: str, engine: Engine, *arguments: Mapping[str, float] | str | Image
    ) -> None:
        if not engine.ranks.is_main or (self.switched_off and action != "close"):
            return
        raised: Exception | None = None
        try:
            getattr(self, action)(engine, *arguments)
        except Exception as error:  # a logger must never end a run of weeks
            raised = error
        self._attempted(action, engine.state.step, raised)

    def _attempted(
        self, action: str, step: int, error: BaseException | None, fatal: bool = False
    ) -> None:
        """Take note of how a call went: warn of a failure, and switch the logger off if `fatal`."""
        if error is None:
            self.failures = 0
            return
        self.failures += 1
        self.failures_in_all += 1
        self.switched_off = fatal or self.failures >= self.FAILURES_ALLOWED
        what = f"{action} at step {step} ({type(error).__name__}: {error})"
        self._last_failure = what
        end = "it is switched off" if self.switched_off else "continuing"
        message = f"logger '{self.name}' failed to {what}; {end}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
