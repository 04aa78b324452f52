"""Writes every metric for TensorBoard."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from nexus_core import Logger, LoggerConfig, PluginConfig, hookimpl
from nexus_core.cli import yaml12
from nexus_core.cli.lineage import changes
from nexus_core.cli.settings import read_settings
from nexus_core.paths import PathText

if TYPE_CHECKING:
    from torch.utils.tensorboard import FileWriter

    from nexus_core.engine import Engine
    from nexus_core.images import Image

__all__ = ["TensorboardConfig", "TensorboardPlugin"]

Block = Mapping[str, Any]

_MARKUP = re.compile(r"[\\`*_#\[\]]")  # characters that the Text tab would read as Markdown


CHARTS = {
    "training loss": r"train/total_loss$",
    "evaluation loss": r"(?!train/|system/)[^/]+/loss$",
    "bits per byte": r"[^/]+/bits_per_byte$",
    "learning rate": r"train/learning_rate",
    "tokens per second": r"system/throughput_tokens_per_sec$",
    "gradient norm": r"train/grad_norm$",
}
"""The charts of the Custom Scalars tab, in order, with patterns of their metrics."""


CHANGED = "(changed)"
"""A name that the HParams tab sorts before all settings."""


class TensorboardConfig(LoggerConfig):
    """Settings of the TensorBoard files."""

    folder: PathText = Field(
        default="tensorboard", min_length=1, description="folder name in the run folder"
    )
    flush_seconds: float = Field(
        default=10.0,
        gt=0,
        description="maximum delay until logged values are in the file, in seconds",
    )
    baseline: str | None = Field(
        default=None,
        description="preset; its settings that the run changes are first in the HParams tab",
    )


class TensorboardPlugin(Logger[TensorboardConfig]):
    """Writes logs and evaluations as scalars, notes as text and images, the config as HParams.

    Does not affect training. The Custom Scalars tab starts with the loss. On resume, TensorBoard
    is told to drop the points of steps that will be repeated. View it with
    `tensorboard --logdir OUT/tensorboard`.
    """

    config_class = TensorboardConfig
    writes_files = True
    _writer: FileWriter | None = None
    _tags: frozenset[str] = frozenset()
    _changed = ""

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Compare the settings with those of the baseline.

        Raises:
            ConfigError: the engine has no `out`, or there is no such preset.
        """
        if self.config.baseline is not None and engine.config:
            self._changed = _changed(engine, self.config.baseline)
        super().on_start(engine)

    def open(self, engine: Engine) -> None:
        """Open an event file, marking the step it resumes from, and write the config."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import hparams, text

        assert engine.out is not None
        folder = engine.out / self.config.folder
        writer = FileWriter(str(folder), flush_secs=self.config.flush_seconds)
        step = engine.state.step
        forget_from = step + 1 if step else 0
        writer.add_event(
            Event(step=forget_from, session_log=SessionLog(status=SessionLog.START)), forget_from
        )
        if engine.config:
            shown = yaml12.dump(engine.config).replace("\n", "\n    ")
            writer.add_summary(text("config", f"    {shown}"), step)  # type: ignore[no-untyped-call]
            settings = dict(_flat(engine.config))
            settings.pop("out", None)  # each run has its own
            if self._changed:
                settings[CHANGED] = self._changed
            # Without an experiment summary, TensorBoard itself finds what differs between runs.
            _, begun, _ = hparams(settings, {})  # type: ignore[no-untyped-call]
            writer.add_summary(begun, step)
        self._writer, self._tags = writer, frozenset()

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Write all metrics as one event."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from torch.utils.tensorboard.summary import custom_scalars

        if self._writer is None:
            return
        if metrics.keys() - self._tags:
            self._tags = self._tags.union(metrics)
            charts = {
                title: ["Multiline", [pattern]]
                for title, pattern in CHARTS.items()
                if any(re.match(pattern, tag) for tag in self._tags)
            }
            layout = custom_scalars({"run": charts})  # type: ignore[no-untyped-call]
            self._writer.add_summary(layout, engine.state.step)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._writer.add_summary(Summary(value=values), engine.state.step)

    def write_note(self, engine: Engine, title: str, text: str) -> None:
        """Write the text under its title, for the Text tab."""
        from torch.utils.tensorboard.summary import text as summary

        if self._writer is None:
            return
        shown = _MARKUP.sub(r"\\\g<0>", text).replace("<", "&lt;").replace("\n", "  \n")
        self._writer.add_summary(summary(title, shown), engine.state.step)  # type: ignore[no-untyped-call]

    def write_image(self, engine: Engine, title: str, image: Image) -> None:
        """Write the image for the Images tab, as the title plus `/image`, and its caption."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            return
        png = Summary.Image(width=image.width, height=image.height, encoded_image_string=image.png)
        value = Summary.Value(tag=f"{title}/image", image=png)
        self._writer.add_summary(Summary(value=[value]), engine.state.step)
        if image.caption:
            self.write_note(engine, title, image.caption)

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Say how to view the curves."""
        folder = Path(engine.out or "", self.config.folder)
        logs = engine.out if engine.out in folder.parents else folder
        return {
            "curves": f"tensorboard --logdir {shlex.quote(str(logs))}",
            **super().summarize(engine),
        }

    def close(self, engine: Engine) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _changed(engine: Engine, preset: str) -> str:
    """How a run differs from a preset, in the form of `--set` and `--plugins`."""
    run, now = read_settings(preset, anew=False).run, engine.config.get("plugins", {})
    blocks = {
        name: _completed(engine.plugins[name].config_class, block, now[name])
        if name in now
        else block
        for name, block in run.plugins.items()
    }
    before = {**run.model_dump(mode="json"), "plugins": blocks}
    found = changes(before, engine.config).items()
    return ", ".join(_said(key, *values) for key, values in found) or "nothing"


def _completed(kind: type[PluginConfig], block: Block, now: Block) -> Block:
    """A preset's block with its defaults, without the settings that every run has to set."""
    given = {
        key: now[key]
        for key, field in kind.model_fields.items()
        if field.is_required() and key not in block
    }
    full = kind(**block, **given).model_dump(mode="json")
    return {key: value for key, value in full.items() if key not in given}


def _said(key: str, before: object, after: object) -> str:
    if isinstance(after, Mapping):
        return f"+{key}"
    return f"no:{key}" if isinstance(before, Mapping) else f"{key}={after}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float]]:
    """The leaves of a config under dotted keys, as in `--set`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, "" if (prefix, key) == ("", "plugins") else f"{prefix}{key}.")
        elif isinstance(value, str | bool | int | float):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", str(value)
