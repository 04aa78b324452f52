"""Re-execute a recorded run from its config and a checkpoint, in a temporary folder."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nexus_core import Logger, LoggerConfig, Plugin
from nexus_core.cli.lineage import read_lineage
from nexus_core.cli.recorded import Saved, checkpoints, config_of, only_trusted, without_watchers
from nexus_core.errors import RunError
from nexus_core.plan import answering, arrange
from nexus_plugins.tape.lines import Line, Tape, read_tape
from nexus_plugins.tape.plugin import TapePlugin

if TYPE_CHECKING:
    from nexus_core.cli.build import Build
    from nexus_core.engine import Engine
    from nexus_core.plan import Plan

__all__ = ["Again", "Recorded", "Watch", "executed", "intervals"]

_TAPE = "again.jsonl"


@dataclass(frozen=True)
class Recorded:
    """A recorded run.

    Args:
        folder: the run folder.
        trust: whether local code named in its config may be run.
        tape: its tape.
        saved: its checkpoints by step.
        start: step and checkpoint of another run that it branched off; None: it is not a branch.
    """

    folder: Path
    trust: bool
    tape: Tape
    saved: dict[int, Path]
    start: tuple[int, Path] | None = None
    directory: Path = field(default_factory=Path.cwd)  # base of relative paths in its config

    @classmethod
    def at(cls, folder: Path, *, trust: bool) -> Recorded:
        """Open the run in a folder.

        Raises:
            ConfigError: it is not a run folder.
        """
        config_of(folder)
        folder = folder.absolute()
        parent = read_lineage(folder).parent
        start = None if parent is None else (parent.step, Path(parent.run) / parent.source)
        return cls(folder, trust, read_tape(folder), checkpoints(folder), start)

    @property
    def first(self) -> int:
        """The step after which it starts: 0, or that of the checkpoint that it branched off."""
        return self.start[0] if self.start else 0

    def before(self, step: int) -> int:
        """The step of the newest checkpoint at or before a step; `first`: from the beginning."""
        return max((at for at in self.saved if at <= step), default=self.first)

    def source(self, step: int) -> Path | None:
        """The checkpoint to start from after a step; None: from the beginning."""
        return self.saved.get(step, self.start[1] if self.start else None)

    def config_after(self, step: int) -> Path:
        """The config that the run had after a step: it may have been resumed with another one."""
        later = [path for at, path in self.saved.items() if at > step]
        return Saved(self.folder, later[0]).config if later else config_of(self.folder)

    def unknown(self, begin: int, end: int) -> list[str]:
        """The sessions within a part of the run whose settings are not kept, in words."""
        return [
            f"the run was resumed at step {session['step']}, of which no checkpoint is kept: its "
            "settings may have been different before"
            for session in self.tape.sessions
            if begin < session["step"] < end and session["step"] not in self.saved
        ]

    def lock(self) -> dict[str, Any]:
        """The lock of its newest checkpoint; empty if it has none."""
        return self._document("lock.json")

    def data(self) -> str | None:
        """The fingerprint of its data, if it has one."""
        data = self._document("state.json").get("data")
        return data.get("fingerprint") if isinstance(data, dict) else None

    def _document(self, name: str) -> dict[str, Any]:
        try:
            path = self.saved[max(self.saved, default=0)] / name
            found = json.loads(path.read_text(encoding="utf-8"))
        except (KeyError, OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class _HeardPlugin(Logger[LoggerConfig]):
    """Collects what a run logs and evaluates, as loggers receive it."""

    config_class = LoggerConfig
    name: ClassVar[str] = "heard_again"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def write(self, engine: Engine, metrics: Any) -> None:
        """Record a log or an evaluation."""
        self.metrics.append((engine.state.step, dict(metrics)))


@dataclass
class Again:
    """The result of re-executing part of a run.

    Args:
        engine: the engine, after the last step.
        lines: tape lines, by step.
        metrics: the logs and evaluations, with their steps.
        notes: how the rebuilt run differs from the original, in words.
    """

    engine: Engine
    lines: dict[int, Line] = field(default_factory=dict)
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Watch:
    """Observes a re-execution; subclasses define what is observed."""

    def plugins(self) -> tuple[list[Plugin[Any]], list[Plugin[Any]]]:
        """Plugins to run before and after those of the run."""
        return [], []

    def watch(self, plan: Plan) -> None:
        """Called when the plugins exist, before the engine is built."""

    def attach(self, engine: Engine) -> None:
        """Called when the engine is built and the checkpoint restored."""

    def before(self, engine: Engine, step: int) -> None:
        """Called before each step."""


def executed(
    recorded: Recorded, begin: int, end: int, *, modules: int = 2, watch: Watch | None = None
) -> Again:
    """Re-execute steps of a run, in a temporary folder.

    Args:
        recorded: the run.
        begin: the step of the checkpoint to start from; `recorded.first`: the beginning.
        end: the last step to take.
        modules: the setting `modules` of the new tape.
        watch: the observer.

    Raises:
        RunError: the run ends before that step.
    """
    watch = watch or Watch()
    with (
        TemporaryDirectory(prefix="nexus-again-") as room,
        only_trusted(recorded.folder, trust=recorded.trust),
        _threads_of(recorded, begin + 1),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        tape = TapePlugin.labelled("again")(file=_TAPE, modules=modules, at_once=True)
        heard = _HeardPlugin()
        made, dropped = _built(recorded, begin, watch, [tape, heard])
        engine = _begun(made, recorded, begin, Path(room) / "run")
        watch.attach(engine)
        _walk(engine, made, end, watch.before)
        lines = read_tape(Path(room) / "run", _TAPE).lines
        notes = [str(warning.message) for warning in told]
        notes = [n for n in notes if n.startswith("resuming:") and not _of(n, dropped)]
        return Again(engine, dict(lines), heard.metrics, notes)


def _built(
    recorded: Recorded, begin: int, watch: Watch, added: list[Plugin[Any]]
) -> tuple[Build, list[str]]:
    """The run's plugins, except observers; and the names of dropped and added ones."""
    from nexus_core.cli.build import build_plugins
    from nexus_core.cli.settings import read_settings

    config = recorded.config_after(begin)
    reader = answering("load_snapshot").name
    settings = read_settings(str(config), trusted=recorded.trust)
    if reader in settings.run.plugins:
        values = {f"{reader}.resume_policy": "force"}
        settings = read_settings(str(config), values=values, trusted=recorded.trust)
    made = build_plugins(settings)
    kept = [p for p in made.plan.plugins if not getattr(p, "only_watches", False)]
    first, last = watch.plugins()
    plan = arrange([*first, *kept, *last, *added])
    strangers = [p.name for p in (*made.plan.plugins, *plan.plugins) if p not in kept]
    watch.watch(plan)
    return dataclasses.replace(made, plan=plan), strangers


def _begun(made: Build, recorded: Recorded, begin: int, room: Path) -> Engine:
    """Bring the engine to a checkpoint."""
    from nexus_core.cli.build import make_engine

    engine = make_engine(made, room)
    if source := recorded.source(begin):
        snapshot = engine.hook.load_snapshot(engine=engine, source=str(source))
        watching = {n: bool(getattr(p, "only_watches", False)) for n, p in engine.plugins.items()}
        engine.load_state_dict(without_watchers(snapshot, watching))
    return engine


def _walk(engine: Engine, made: Build, end: int, before: Callable[[Engine, int], None]) -> None:
    steps = engine.steps(until=made.run.until, eval_every=made.run.eval_every)
    try:
        while engine.state.step < end:
            before(engine, engine.state.step + 1)
            if next(steps, None) is None:
                break
        if made.run.until.reached(engine.state):
            next(steps, None)  # the last log and evaluation
    finally:
        steps.close()  # type: ignore[attr-defined]
    if engine.state.step < end:
        raise RunError(
            f"re-executed, the run ends at step {engine.state.step}, before the requested step "
            f"{end}; its config has changed"
        )


@contextmanager
def _threads_of(recorded: Recorded, step: int) -> Iterator[None]:
    """Use the thread count of the recorded run within this context."""
    before, wanted = torch.get_num_threads(), recorded.tape.environment(step).get("threads")
    if isinstance(wanted, int) and wanted > 0:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of(note: str, plugins: list[str]) -> bool:
    """Whether a note is about observers that were dropped or added."""
    return any(f"'{name}'" in note for name in plugins) or "resume_policy" in note


def intervals(recorded: Recorded) -> Iterator[tuple[int, int]]:
    """The intervals between a run's checkpoints, including the start."""
    edges = [recorded.first, *recorded.saved]
    yield from pairwise(edges)
