"""Plugins that show or store metrics, and whose failures do not stop a run."""

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
    """Settings shared by all loggers."""


LoggerConfigT = TypeVar("LoggerConfigT", bound=LoggerConfig)


class Logger(Plugin[LoggerConfigT]):
    """A plugin that shows or stores metrics, and whose failures do not stop the run.

    Implement `open`, `write` and `close` instead of hooks, and `write_note` and `write_image` to
    store text and images. They are called in the main process only. A failure gives a warning;
    after three in a row the logger is switched off for the rest of the run, and closed at its end.
    The run's summary repeats failures: if you override `summarize`, add your lines to those of
    `super().summarize(engine)`. For a service that may be slow or hang, see
    `nexus_core.bases.background`.
    """

    writes_files: ClassVar[bool] = False  # needs a run folder
    only_watches: ClassVar[bool] = True  # its state may differ between equal runs
    FAILURES_ALLOWED: ClassVar[int] = 3
    failures: int = 0  # in a row, so far
    failures_in_all: int = 0
    switched_off: bool = False
    _last_failure: str = ""

    def open(self, engine: Engine) -> None:
        """Prepare to write; the run starts or resumes at `engine.state.step`."""

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics, by name, of step `engine.state.step`."""
        raise NotImplementedError(f"{type(self).__name__}.write")

    def write_evaluation(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Store the metrics of an evaluation; the same as `write` unless overridden."""
        self.write(engine, metrics)

    def write_note(self, engine: Engine, title: str, text: str) -> None:
        """Store a note of step `engine.state.step`; does nothing by default.

        Args:
            title: the topic, in the style of a metric name: `sensors/loss_explosion`.
            text: plain text, without Markdown, in one or more lines.
        """

    def write_image(self, engine: Engine, title: str, image: Image) -> None:
        """Store an image of step `engine.state.step`; does nothing by default.

        Args:
            title: what it shows, in the style of a metric name; may equal one.
            image: a PNG with its size and caption, which may be empty.
        """

    def close(self, engine: Engine) -> None:
        """Finish writing; called at the end of a run, also after an error."""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Open the logger.

        Raises:
            ConfigError: the logger writes files, and the engine has no `out`.
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
        """The failures; empty if there were none."""
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
        except Exception as error:  # a logger must never end a run
            raised = error
        self._attempted(action, engine.state.step, raised)

    def _attempted(
        self, action: str, step: int, error: BaseException | None, fatal: bool = False
    ) -> None:
        """Process a call's outcome: warn of a failure, and switch the logger off if `fatal`."""
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
