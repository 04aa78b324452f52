"""A trial in its own process: an ordinary run that reports its evaluations to Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_core.cli.launch import Recipe, train_in_folder
from nexus_core.engine import Engine
from nexus_plugins_contrib.sweep.study import trial_of

__all__ = ["work"]


def work(recipe: Recipe, run: Path, sweep: Path, number: int, metric: str) -> None:
    """Train a trial's run.

    Args:
        recipe: recipe of the run.
        run: its folder.
        sweep: the sweep folder.
        number: of the trial, as Optuna stores it.
        metric: the metric to report.
    """
    trial = trial_of(sweep, number)

    def watch(engine: Engine) -> None:
        """Report every evaluation to Optuna, after all plugins have seen it."""
        told = engine.hook.on_eval
        known = set(trial.study._storage.get_trial(number).intermediate_values)

        def on_eval(*, engine: Engine, metrics: dict[str, float]) -> Any:
            answer = told(engine=engine, metrics=metrics)
            _report(engine, metrics, known)
            return answer

        vars(engine.hook)["on_eval"] = on_eval

    def _report(engine: Engine, metrics: Mapping[str, float], known: set[int]) -> None:
        value, step = metrics.get(metric), engine.state.step
        if value is None or not math.isfinite(value) or not engine.ranks.is_main:
            return
        if step not in known:
            trial.report(value, step)
        is_last = engine.horizon is not None and engine.horizon.reached(engine.state)
        if not is_last and trial.should_prune():
            engine.stop("pruned")

    train_in_folder(recipe, run, {}, watch)
