"""Rebuild the model and tokenizer of a run from its folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from nexus_core.cli.recorded import only_trusted, saved_at, without_watchers
from nexus_core.data import RunData
from nexus_core.errors import ConfigError
from nexus_core.plan import answering, arrange
from nexus_core.plugin import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.cli.build import Build
    from nexus_core.cli.recorded import Saved
    from nexus_core.engine import Engine

__all__ = ["Writer", "writer_of"]


@dataclass(frozen=True)
class Writer:
    """A model ready to generate text.

    Args:
        engine: an engine with the model, at its checkpoint.
        codec: the tokenizer of the run's data.
        step: step of the checkpoint.
    """

    engine: Engine
    codec: Any
    step: int


class _CodecPlugin(Plugin[PluginConfig]):
    """Stands in for the data of a run that only generates."""

    name: ClassVar[str] = "codec_of_the_run"
    slot: ClassVar[str | None] = "data"

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self._codec = codec

    @hookimpl
    def make_data(self) -> RunData:
        """No rows, but the codec."""
        return RunData((), codec=self._codec)


@contextmanager
def writer_of(source: str, *, device: str | None = None, trust: bool = False) -> Iterator[Writer]:
    """Build the model of a run with the weights of a checkpoint; the run is not changed.

    If the data's plugin has `codec_in(run)`, the data itself need not exist any more.

    Args:
        source: RUN, RUN@STEP, RUN@best or a checkpoint.
        device: as a run's setting `device`; None: that of the run.
        trust: use local code named in its config.

    Raises:
        ConfigError: there is no such checkpoint, or its data has no tokenizer.
    """
    saved = saved_at(source)
    with TemporaryDirectory(prefix="nexus-write-") as room, only_trusted(saved.run, trust=trust):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing training plugins
            engine = _engine(saved, device, trust, Path(room))
        codec = engine.data.codec if engine.data is not None else None
        if codec is None:
            raise ConfigError(
                f"the data of '{saved.run}' has no tokenizer to read and write text; let "
                "make_data return RunData(..., codec=...)"
            )
        yield Writer(engine, codec, engine.state.step)


def _engine(saved: Saved, device: str | None, trust: bool, room: Path) -> Engine:
    from nexus_core.cli.build import make_engine

    made = _built(saved, device, trust)
    watching = {p.name: bool(getattr(p, "only_watches", False)) for p in made.plan.plugins}
    kept = [plugin for plugin in made.plan.plugins if not watching[plugin.name]]
    for number, plugin in enumerate(kept):
        codec_in = getattr(plugin, "codec_in", None)
        if codec_in is not None:
            kept[number] = _CodecPlugin(codec_in(saved.run))
            watching[plugin.name] = True
    engine = make_engine(replace(made, plan=arrange(kept)), room / "run")
    snapshot = engine.hook.load_snapshot(engine=engine, source=str(saved.path))
    engine.load_state_dict(without_watchers(snapshot, watching))
    return engine


def _built(saved: Saved, device: str | None, trust: bool) -> Build:
    from nexus_core.cli.build import build_plugins
    from nexus_core.cli.settings import read_settings

    values: dict[str, object] = {"device": device} if device is not None else {}
    reader = answering("load_snapshot").name
    values[f"{reader}.resume_policy"] = "force"
    settings = read_settings(str(saved.config), "", (), os.environ, values, trusted=trust)
    return build_plugins(settings).quiet()
