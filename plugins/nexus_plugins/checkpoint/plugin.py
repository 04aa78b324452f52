"""Saves the run so that it can be killed at any moment and resumed bitwise identically."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from nexus_core import Every, Interval, IntervalField, Plugin, PluginConfig, hookimpl
from nexus_core.batches import fingerprint
from nexus_core.cli import yaml12
from nexus_core.cli.tables import as_bytes
from nexus_core.data import DataState
from nexus_core.errors import CheckpointError, ConfigError, RunError, hint_out, hint_resume
from nexus_core.plugin import StateDict
from nexus_core.processes import gather, is_sharded, local_part
from nexus_core.snapshot import Snapshot
from nexus_plugins._shared.checkpoints import folder
from nexus_plugins._shared.checkpoints.folder import Json
from nexus_plugins._shared.checkpoints.shards import Shards, lay_out, layout_of
from nexus_plugins._shared.checkpoints.store import NAMES, Store, newest_first, step_of
from nexus_plugins._shared.numerics import numerics
from nexus_plugins.checkpoint import course, lock
from nexus_plugins.checkpoint.codec import TensorBag, encode
from nexus_plugins.checkpoint.hostcopy import HostCopy
from nexus_plugins.checkpoint.kinds import Kinds, kinds_of
from nexus_plugins.checkpoint.optimizer import describe_optimizer, take_over
from nexus_plugins.checkpoint.packing import fresh, pack, parts, unpack
from nexus_plugins.checkpoint.peers import check_same_step, own_share, with_peers
from nexus_plugins.checkpoint.reading import read, read_newest, read_path
from nexus_plugins.checkpoint.run_lock import RunLock
from nexus_plugins.checkpoint.storable import check_storable
from nexus_plugins.checkpoint.writer import Writer

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["CheckpointConfig", "CheckpointPlugin"]

_PARTS = "parts"
_GENERATORS = 1 << 20  # bytes, ample for the states of all random generators
_IGNORED: dict[str, Any] = {"resume": "ignored"}


class CheckpointConfig(PluginConfig):
    """When to save, what to keep, and how strict to be on resume."""

    every: IntervalField = Field(
        default=Interval(1000, "steps"),
        description="interval between saves: steps, epochs, samples, tokens, time or a share",
        json_schema_extra=_IGNORED,
    )
    keep_last: int = Field(
        default=5,
        ge=1,
        description="number of newest checkpoints to keep",
        json_schema_extra=_IGNORED,
    )
    keep_every: IntervalField | None = Field(
        default=None,
        description="keep the first checkpoint after each such interval forever",
        json_schema_extra=_IGNORED,
    )
    best: str | None = Field(
        default="val/loss",
        description="evaluation metric whose best value is saved as 'best'; null: none",
    )
    mode: Literal["min", "max"] = Field(
        default="min", description="whether lower or higher is better"
    )
    final: bool = Field(
        default=True, description="save the end of the run as 'final'", json_schema_extra=_IGNORED
    )
    sync: bool = Field(
        default=False,
        description="save synchronously instead of in a background thread: slower, but without "
        "memory for a copy",
        json_schema_extra=_IGNORED,
    )
    failures_allowed: int = Field(
        default=2,
        ge=0,
        description="consecutive saves that may fail with a warning before the run stops",
        json_schema_extra=_IGNORED,
    )
    resume_policy: lock.Policy = Field(
        default="exact",
        description="'exact' rejects plugins, versions or data that differ from the checkpoint's; "
        "'compatible' allows other versions and data; 'force' loads whatever can be "
        "loaded",
        json_schema_extra=_IGNORED,
    )


@dataclass(frozen=True)
class _Record:
    """The best evaluation so far."""

    value: float
    step: int


class CheckpointPlugin(Plugin[CheckpointConfig]):
    """Saves the full state of a run, and finds the newest valid checkpoint to resume from.

    A checkpoint is a folder `OUT/checkpoints/step-00000100`, written under a temporary name, synced
    and renamed, so it is either complete or absent; `best` and `final` are links to such folders.
    Another instance, `checkpoint@f1`, saves to `OUT/checkpoints@f1`. Training only pauses for a
    copy to host memory; a thread does the writing. Nothing is ever pickled or unpickled.
    """

    config_class = CheckpointConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._best: _Record | None = None
        self._saved_step = -1
        self._best_saved_step = -1
        self._reserved = False
        self._failures = 0
        self._best_written: _Record | None = None
        self._best_in_flight: _Record | None = None
        self._host = HostCopy()
        self._shards = Shards()
        self._writer: Writer | None = None
        self._run_lock: RunLock | None = None
        self._resumed = False
        self._course: course.Course | None = None
        self._left: DataState | None = None  # the checkpoint's data state, for comparison
        self._left_numerics: Json = None  # the checkpoint's numerics, for comparison
        self._built: dict[str, Json] | None = None  # the optimizer before anything was restored
        self._kinds: dict[str, Kinds] | None = None  # of the plugins' states at that time
        self._checked = False
        self._speaks = True  # rank 0 reports for all ranks

    def state_dict(self) -> StateDict:
        """The best value so far, so that a resumed run does not mark a worse one as best."""
        return {"value": self._best.value, "step": self._best.step} if self._best else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what `state_dict` returned."""
        value, step = state.get("value"), state.get("step")
        if type(value) not in (int, float) or type(step) is not int:
            raise CheckpointError(f"the checkpoint's record of the best is {str(state)[:200]}")
        self._best = self._best_written = _Record(float(cast(float, value)), step)

    @hookimpl
    def load_snapshot(self, engine: Engine, source: str) -> Snapshot:
        """Read the snapshot to resume from.

        Args:
            engine: the engine to resume.
            source: "auto" (the newest valid checkpoint of this run, or from scratch if nothing is
                saved yet), "best", "final", or a checkpoint or run folder.

        Raises:
            CheckpointError: there is no valid one, or it does not fit this run.
        """
        self._resumed = True
        self._best = self._best_written = None
        self._look(engine)
        store = self._own_store(engine)
        saved = newest_first(self._stores(engine))
        asked, source = source, course.source_for(source, store.root, saved=bool(saved))
        if source == "auto":
            check_same_step(step_of(saved[0].name) if saved else -1, engine.ranks)
        content = self._find(engine, source)
        check_same_step(content.step if content else -1, engine.ranks)
        if content is None:
            return fresh(engine)
        self._course = None
        if source != "auto" and content.source is not None:
            self._course = course.begun(asked, content.source)
        return self._snapshot(content, engine)

    @hookimpl(stage="claim")
    def on_start(self, engine: Engine) -> None:
        self._look(engine)
        self._compare_data(engine)
        self._saved_step = self._best_saved_step = -1
        self._failures = 0
        self._every = Every(self.config.every.of(engine.horizon), engine.state)
        keep_every = self.config.keep_every and self.config.keep_every.of(engine.horizon)
        self._keep_every = Every(keep_every, engine.state)
        self._store = self._own_store(engine)
        self._speaks = engine.ranks.is_main
        if engine.ranks.is_main:
            self._run_lock = RunLock(self._store.root.parent, self.label)
            self._store.recover()
            self._make_way(engine)
            self._tell_notices()
            self._about = cast(dict[str, Json], {**lock.describe(engine), "optimizer": self._built})
            self._config_bytes = _config_text(engine)
        if engine.ranks.is_main or any(map(is_sharded, engine.model.parameters())):
            self._writer = Writer()

    @hookimpl(stage="decide")
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        name = self.config.best
        if name is None:
            return
        if name not in metrics:
            warnings.warn(
                f"{self.name}.best is '{name}', which this evaluation does not have; it has "
                f"{', '.join(sorted(metrics))}",
                RuntimeWarning,
                stacklevel=2,
            )
        elif self._is_best(value := float(metrics[name])):
            self._best = _Record(value, engine.state.step)

    @hookimpl(stage="save")
    def on_step_end(self, engine: Engine) -> None:
        if not self._checked:
            self._checked = True
            check_storable(parts(engine))
            self._compare_numerics(engine)
        if self._every.due(engine.state) or self._best_is_due(engine):
            self._save(engine)
        elif self._writer is not None and not self._writer.busy:
            if engine.ranks.size == 1:  # with several ranks the outcome is exchanged later
                self._settle(self._writer)
            if not (self._writer.pending or self._reserved or self.config.sync):
                self._reserve(engine, self._writer)

    @hookimpl(stage="save")
    def on_finish(self, engine: Engine) -> None:
        done = engine.horizon is not None and engine.horizon.reached(engine.state)
        if done and self.config.final:
            self._save(engine, "final")
        elif self._best_is_due(engine) or not (done or self._saved_step == engine.state.step):
            self._save(engine)

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Say where the checkpoints are, their size, and what decides how many there are."""
        if engine.out is None:
            return {}
        store = self._own_store(engine)
        files = [file for kept in store.folders() for file in kept.rglob("*") if file.is_file()]
        said = f"{store.root}, {as_bytes(sum(file.stat().st_size for file in files))}"
        if len(store.folders()) > 1:
            said += f" in {len(store.folders())} ({self.name}.keep_last={self.config.keep_last})"
        return {self._folder: said}

    @hookimpl
    def on_close(self) -> None:
        writer, self._writer = self._writer, None
        held, self._run_lock = self._run_lock, None
        try:
            if writer is not None:
                self._failures = self.config.failures_allowed  # there is no later save
                self._settle(writer)
        finally:
            if writer is not None:
                writer.close()
            if held is not None:
                held.release()

    def _look(self, engine: Engine) -> None:
        """Record once how the run was built, before anything is restored or trained."""
        if self._built is None or self._kinds is None:
            self._built, self._kinds = describe_optimizer(engine), kinds_of(engine)

    def _save(self, engine: Engine, *names: str) -> None:
        """Copy the state, and start writing it."""
        if self._writer is not None:
            self._settle(self._writer)
        self._best = gather(engine.ranks, self._best)[0]  # rank 0 knows what has failed
        snapshot = with_peers(engine.state_dict(), engine.ranks)
        step = self._saved_step = engine.state.step
        if self._is_best_step(engine):
            self._best_saved_step = step
            names = ("best", *names)
        if self._writer is None:  # rank 0 writes for this rank
            return
        content = pack(snapshot)
        cut = self._shards.take_out(content, _patience(engine))
        if engine.ranks.is_main:
            content.documents["lock.json"] = {
                **self._about,
                "numerics": cast(Json, numerics(engine.device)),
            }
            content.config = self._config_bytes
            content.keep = self._keep_every.due(engine.state)
        else:
            content.tensors = {}
        if not self.config.sync:
            content.tensors = self._host.copy({**content.tensors, _PARTS: cut})
            self._shards.replace(content.tensors.pop(_PARTS))
        self._best_in_flight = self._best if "best" in names else None
        save = partial(self._store.save, content, names, self.config.keep_last)

        def write() -> None:
            self._host.wait()
            self._shards.write(engine.ranks, save)

        self._writer.start(write)
        if self.config.sync:
            self._settle(self._writer)

    def _settle(self, writer: Writer) -> None:
        """Wait for the pending save and process its outcome.

        Raises:
            RunError: it failed, and so did earlier ones.
        """
        if not writer.pending:
            return
        error = writer.finish()
        self._tell_notices()
        tried, self._best_in_flight = self._best_in_flight, None
        if error is None:
            self._failures = 0
            self._best_written = tried or self._best_written
            return
        if self._best == tried:  # a better one since then will be saved later
            self._best = self._best_written
        self._failures += 1
        where = f"the checkpoint of step {self._saved_step} could not be written"
        what = f"{where} to {self._store.root}: {error}"
        if not isinstance(error, OSError):
            raise RunError(f"{what}; the run can be resumed from the previous save") from error
        if self._failures > self.config.failures_allowed:
            raise RunError(f"{what}; free space or fix the disk, then ", hint_resume()) from error
        if self._speaks:
            _say(f"{what}; training continues, and the next save tries again")

    def _reserve(self, engine: Engine, writer: Writer) -> None:
        """Reserve the memory for the copies in the background before the first save."""
        self._reserved = True
        bag = TensorBag()
        encode(parts(engine), bag)
        tensors = [local_part(tensor) for tensor in bag.tensors.values()]
        writer.start(lambda: self._host.reserve(tensors, _GENERATORS))

    def _is_best(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self._best is None:
            return True
        best = self._best.value
        return value < best if self.config.mode == "min" else value > best

    def _is_best_step(self, engine: Engine) -> bool:
        return self._best is not None and self._best.step == engine.state.step

    def _best_is_due(self, engine: Engine) -> bool:
        return self._is_best_step(engine) and self._best_saved_step != engine.state.step

    def _find(self, engine: Engine, source: str) -> folder.Content | None:
        """The checkpoint that a source refers to; None: "auto", and nothing is saved yet."""
        if source not in ("auto", *NAMES):
            return read_path(Path(source), engine.ranks)
        if source != "auto":
            return read(self._own_store(engine).named(source), engine.ranks)
        return read_newest(self._stores(engine), engine.ranks)

    @property
    def _folder(self) -> str:
        """The name of this instance's checkpoint folder."""
        return f"checkpoints@{self.label}" if self.label else "checkpoints"

    def _stores(self, engine: Engine) -> list[Store]:
        """The stores of all instances of this run, its own last."""
        own, mine = self._own_store(engine), self.name.partition("@")[0]
        labels = [name.partition("@") for name in engine.plugins if name != self.name]
        others = [f"checkpoints{at}{label}" for name, at, label in labels if name == mine]
        return [*(Store(own.root.with_name(folder)) for folder in others), own]

    def _own_store(self, engine: Engine) -> Store:
        if engine.out is None:
            raise ConfigError(
                "the checkpoint plugin needs a run folder: pass out=... to the Engine"
            )
        return Store(engine.out / self._folder)

    def _make_way(self, engine: Engine) -> None:
        """Set aside checkpoints of an abandoned history of this run."""
        step, folders = engine.state.step, self._store.folders()
        if folders and step == 0 and not self._resumed:
            raise CheckpointError(
                f"{self._store.root} has checkpoints of an earlier run, the newest "
                f"{folders[-1].name}; resume from it with ",
                hint_resume(),
                ", or choose another folder: ",
                hint_out(),
            )
        begun, self._course = self._course, None
        if begun is not None:
            course.note(begun, self._store.root, ready=False)
        elif not self._resumed and step == 0:
            course.forget(self._store.root)
        foreign = begun is not None and begun.is_foreign(self._store.root)
        for moved in self._store.set_aside(after=-1 if foreign else step):
            _say(f"the run continues from step {step}; a later checkpoint was moved to {moved}")
        if begun is not None:
            course.note(begun, self._store.root, ready=True)

    def _tell_notices(self) -> None:
        for notice in self._store.notices():
            _say(notice)

    def _snapshot(self, content: folder.Content, engine: Engine) -> Snapshot:
        policy = self.config.resume_policy
        differences = lock.compare(content.documents["lock.json"], engine, policy, self.name)
        lay_out(content, layout_of(engine))
        snapshot = own_share(unpack(content, engine, self._kinds or {}), engine.ranks, engine.seed)
        states = cast(dict[str, Any], snapshot["plugins"])
        for name in lock.drop_foreign_states(states, engine, policy, self.name):
            differences.append(f"the state of plugin '{name}' is dropped")
        differences += take_over(
            snapshot,
            cast(dict[str, Json], content.documents["lock.json"]).get("optimizer"),
            self._built or {},
            engine,
            force=policy == "force",
            whose=self.name,
        )
        for difference in differences:
            _say(f"resuming: {difference}")
        self._left = snapshot.get("data")
        self._left_numerics = cast(dict[str, Json], content.documents["lock.json"]).get("numerics")
        if engine.data is not None:
            self._hold_against(fingerprint(engine.data.train))
        return snapshot

    def _compare_data(self, engine: Engine) -> None:
        """Compare the data passed to the loop with the checkpoint's, if more will be read."""
        done = engine.horizon is not None and engine.horizon.reached(engine.state)
        if self._left is not None and engine.data_state is not None and not done:
            self._hold_against(engine.data_state["fingerprint"])

    def _compare_numerics(self, engine: Engine) -> None:
        """Compare this run's numerics, once all plugins have set them, with the checkpoint's."""
        policy, left = self.config.resume_policy, self._left_numerics
        for difference in lock.compare_numerics(left, engine.device, policy, self.name):
            _say(f"resuming: {difference}")

    def _hold_against(self, now: str | None) -> None:
        left, self._left = self._left, None
        if difference := lock.compare_data(left, now, self.config.resume_policy, self.name):
            _say(f"resuming: {difference}")


def _patience(engine: Engine) -> timedelta | None:
    """How long the ranks of this run wait for one another; None if no plugin sets it."""
    sharing = (plugin for plugin in engine.plugins.values() if plugin.slot == "processes")
    return next((timedelta(seconds=plugin.config.timeout) for plugin in sharing), None)


def _config_text(engine: Engine) -> bytes | None:
    """The resolved settings, if the run was built from settings."""
    if not engine.config:
        return None
    return yaml12.dump(engine.config).encode()


def _say(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
