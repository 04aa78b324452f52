"""Runs started by a command, several in parallel, each in its own process and folder."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexus_core.cli.branch import branch_off
from nexus_core.cli.build import Build, build_plugins, make_engine
from nexus_core.cli.errors import reported
from nexus_core.cli.folder import RunFolder
from nexus_core.cli.nursery import nursery, stand_alone
from nexus_core.cli.recorded import Saved
from nexus_core.cli.records import CONFIG, Run
from nexus_core.cli.session import has_checkpoints, train
from nexus_core.cli.settings import read_settings
from nexus_core.engine import Engine
from nexus_core.errors import ConfigError, NexusError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

__all__ = ["Crew", "Recipe", "RunFailedError", "branch_in_folder", "checked", "train_in_folder"]

_PATIENCE_S = 60.0  # for a run that is stopping
_WORDS = 600  # words of a log to show


class RunFailedError(NexusError):
    """A run started by a command ended with an error."""

    exit_code = 1


@dataclass(frozen=True)
class Recipe:
    """How to make runs.

    Args:
        config: file or preset; None: the default preset.
        plugins: as in `--plugins`.
        sets: as in each `--set`.
    """

    config: str | None = None
    plugins: str = ""
    sets: tuple[str, ...] = ()

    def build(self, out: Path | None = None, values: Mapping[str, Any] | None = None) -> Build:
        """The build of a run.

        Args:
            out: the run folder.
            values: settings that override all others, by key.

        Raises:
            ConfigError, PluginError: the settings are invalid.
        """
        given = {**(values or {}), **({} if out is None else {"out": out})}
        return build_plugins(read_settings(self.config, self.plugins, self.sets, os.environ, given))


def checked(recipe: Recipe) -> list[str]:
    """Check the settings of runs before starting any.

    Returns:
        The modules that the runs need.

    Raises:
        ConfigError, PluginError: the settings are invalid.
    """
    plugins = recipe.build().plan.plugins
    return ["nexus_core.cli.ready", *sorted({type(plugin).__module__ for plugin in plugins})]


def train_in_folder(
    recipe: Recipe,
    out: Path,
    values: Mapping[str, Any],
    watch: Callable[[Engine], None] = lambda engine: None,
) -> None:
    """Train a run to its end, resuming if it was started before; the process exits with it.

    Args:
        recipe: how to make the run.
        out: its folder.
        values: settings that override all others, by key.
        watch: called with the engine before it trains.
    """
    with reported(debug=True):
        _wait_until_free(out)
        made = recipe.build(out, values).quiet()
        engine = make_engine(made, out)
        watch(engine)
        sys.exit(train(engine, made.run, "auto", RunFolder(out), quiet=True))


def branch_in_folder(recipe: Recipe, out: Path, saved: Saved) -> None:
    """Train a branch of a run to its end, resuming if it was started before.

    Args:
        recipe: how to make the branch; its config is that of the checkpoint.
        out: its folder.
        saved: the checkpoint that it branches off.
    """
    with reported(debug=True):
        _wait_until_free(out)
        made = recipe.build(out).quiet()
        engine, folder = make_engine(made, out), RunFolder(out)
        if not has_checkpoints(out):
            folder.parent = branch_off(engine, saved)
        sys.exit(train(engine, made.run, "auto", folder, quiet=True))


@dataclass
class Crew:
    """A pool of worker processes; on an error they are told to stop and joined.

    Args:
        modules: modules the processes need; imported once for all of them.
        jobs: how many run in parallel; they share the cores.
    """

    modules: Sequence[str]
    jobs: int = 1
    _working: dict[Path, ForkServerProcess] = field(default_factory=dict)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._working.values():
            with suppress(ProcessLookupError, AttributeError):
                process.terminate()  # a run stops after its step, and saves
        for process in self._working.values():
            process.join()

    @property
    def is_full(self) -> bool:
        """Whether all job slots are taken."""
        return len(self._working) >= self.jobs

    def __len__(self) -> int:
        return len(self._working)

    def start(self, out: Path, target: Callable[..., None], *args: Any) -> None:
        """Start a process for a run; its output goes to `OUT.log` next to the folder.

        Args:
            out: the run folder.
            target: a module-level function; it ends by returning or with `sys.exit`.
            args: its arguments; they are pickled.
        """
        out.parent.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, (cores or 1) // self.jobs) if self.jobs > 1 else None
        process = nursery(*self.modules).Process(
            target=_work, args=(_log_of(out), threads, target, args)
        )
        process.start()
        self._working[out] = process

    def wait(self) -> tuple[Path, int]:
        """Wait until one has ended.

        Returns:
            The folder of its run, and its exit code: 0, 128 + the signal that stopped it, negative
            if it was killed, or that of an error.
        """
        ready = connection.wait([process.sentinel for process in self._working.values()])
        out = next(out for out, process in self._working.items() if process.sentinel in ready)
        process = self._working.pop(out)
        process.join()
        return out, process.exitcode or 0

    @staticmethod
    def check(out: Path, code: int) -> None:
        """Raise the error that ended a run.

        Raises:
            ConfigError: a mistake in its settings.
            RunFailedError: any other early end.
        """
        if code == 0:
            return
        log = _log_of(out)
        said = log.read_text(errors="replace") if log.is_file() else ""
        if code == ConfigError.exit_code and "error: " in said:
            raise ConfigError(said.rpartition("\nerror: ")[2].strip())
        stopped = code > 128 or code < 0
        how = "was stopped" if stopped else f"ended with exit code {code}"
        raise RunFailedError(
            f"the run in '{out}' {how}; the same command resumes it; last lines of {log}: "
            f"{said[-_WORDS:].strip()}"
        )


def _wait_until_free(out: Path) -> None:
    """Wait for a process left over from a killed command to finish its last step."""
    limit = time.monotonic() + _PATIENCE_S
    while (out / CONFIG).is_file() and Run(out).status == "running" and time.monotonic() < limit:
        time.sleep(0.1)


def _log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def _work(
    log: Path, threads: int | None, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    stand_alone(log)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    target(*args)


def _stop_with_parent() -> None:
    """Stop the run if the command that started it was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
