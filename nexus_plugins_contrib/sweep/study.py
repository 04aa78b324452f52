"""The study of a sweep: stored in its folder, so that a killed sweep loses nothing."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nexus_core.cli.launch import Recipe
from nexus_core.errors import ConfigError
from nexus_plugins._shared.locks import lock
from nexus_plugins_contrib.sweep.space import Dimension

__all__ = ["Search", "close_value", "folder_of", "opened", "pruners", "samplers"]

_JOURNAL, _LOCK, _NAME = "sweep.journal", "sweep.lock", "sweep"


@dataclass(frozen=True)
class Search:
    """What to search, and how; a sweep folder belongs to one search.

    Args:
        recipe: the recipe of the runs, except what is searched.
        space: the settings to search.
        metric: the metric to optimize.
        mode: "min" or "max".
        sampler, pruner: by their names here.
        seed: seed of the sampler.
    """

    recipe: Recipe
    space: tuple[Dimension, ...]
    metric: str
    mode: str
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What all trials of a sweep must share."""
        fixed = {key: value for key, value in asdict(self).items() if key != "seed"}
        same: dict[str, Any] = json.loads(json.dumps(fixed))
        return same


def samplers(search: Search, drawn: int, jobs: int) -> BaseSampler:
    """The sampler, seeded so that a resumed sweep does not repeat its draws."""
    seed = search.seed + drawn
    if search.sampler == "random":
        return RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=5, constant_liar=jobs > 1)


def pruners(name: str) -> BasePruner:
    """Pruners, which end trials early: "median" (worse than the median), "hyperband", "none"."""
    if name == "hyperband":
        return HyperbandPruner()
    return MedianPruner(n_startup_trials=4) if name == "median" else NopPruner()


@contextmanager
def opened(out: Path, search: Search, jobs: int) -> Iterator[optuna.Study]:
    """The study in a sweep's folder, created if missing, locked for this process.

    Raises:
        ConfigError: the folder belongs to another sweep, or is in use.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as held:
        try:
            lock(held, wait=False)
        except BlockingIOError:
            raise ConfigError(
                f"a sweep is running in '{out}'; wait for it, stop it, or choose another folder "
                "with --out"
            ) from None
        _cut_torn_line(out / _JOURNAL)
        direction = StudyDirection.MINIMIZE if search.mode == "min" else StudyDirection.MAXIMIZE
        pruner = pruners(search.pruner)
        study = optuna.create_study(
            storage=storage(out), study_name=_NAME, direction=direction, pruner=pruner,
            load_if_exists=True,
        )  # fmt: skip
        study.sampler = samplers(search, len(study.get_trials(deepcopy=False)), jobs)
        before = study.user_attrs.get("search")
        if before is None:
            study.set_user_attr("search", search.identity)
        elif before != search.identity:
            other = [key for key, value in search.identity.items() if before.get(key) != value]
            raise ConfigError(
                f"'{out}' has another sweep: {', '.join(other)} differ; choose another folder "
                "with --out"
            )
        yield study


class JournalLock(JournalFileOpenLock):
    """Locks a journal against other processes.

    Optuna's own locks are files, which remain if a process is killed while writing.

    Args:
        path: path of the journal.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        self._held = self._path.open("ab")
        lock(self._held, wait=True)
        return True

    def release(self) -> None:
        """Release the lock."""
        if self._held is not None:
            self._held.close()


def storage(out: Path) -> JournalStorage:
    """The storage of a sweep's trials."""
    journal = out / _JOURNAL
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalLock(journal)))


def trial_of(out: Path, number: int) -> optuna.Trial:
    """Open a trial in another process than the one that created it.

    Args:
        out: the sweep folder.
        number: the trial's id in Optuna's storage.
    """
    study = optuna.load_study(study_name=_NAME, storage=storage(out))
    search = study.user_attrs["search"]
    study.pruner = pruners(search["pruner"])
    return optuna.Trial(study, number)


def folder_of(out: Path, trial: FrozenTrial | optuna.Trial) -> Path:
    """The run folder of a trial."""
    return out / f"trial-{trial.number:04d}"


def close_value(
    study: optuna.Study, trial: FrozenTrial, summary: Mapping[str, Any], search: Search
) -> str:
    """Report the outcome of a trial's run to the study; returns it in words.

    Raises:
        ConfigError: the run does not have the metric.
    """
    metrics = summary.get("metrics", {})
    if summary.get("reason") == "pruned":
        study.tell(trial.number, state=TrialState.PRUNED)
        return f"pruned at step {summary.get('steps', 0):,}"
    if search.metric not in metrics:
        raise ConfigError(
            f"no trial has a metric '{search.metric}'; available: {', '.join(metrics) or 'none'}; "
            "choose one with --metric"
        )
    value = metrics[search.metric]
    if value is None or not math.isfinite(value):
        study.tell(trial.number, state=TrialState.FAIL)
        return f"{search.metric} is not finite"
    study.tell(trial.number, value)
    return f"{search.metric} {value:.4f}"


def left_over(study: optuna.Study) -> Sequence[FrozenTrial]:
    """Unfinished trials of a sweep that was stopped or killed."""
    return study.get_trials(deepcopy=True, states=(TrialState.RUNNING,))


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line of the journal, as left by a power failure."""
    held = JournalLock(path)
    held.acquire()  # a trial of a killed sweep may still be writing
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)
    held.release()
