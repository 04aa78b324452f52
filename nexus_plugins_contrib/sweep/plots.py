"""Plots of a sweep, by Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

__all__ = ["save_plots"]

_LOWEST = 2  # trials needed for a plot


def save_plots(study: optuna.Study, out: Path) -> list[Path]:
    """Plot the history, the importance of each setting and the trials' curves, as PNG files.

    Returns:
        The files; empty if matplotlib is not installed or too few trials are complete.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if find_spec("matplotlib") is None or len(complete) < _LOWEST:
        return []
    from optuna.visualization import matplotlib as drawn

    plots: dict[str, Callable[[optuna.Study], Any]] = {
        "history": drawn.plot_optimization_history,
        "slice": drawn.plot_slice,
        "curves": drawn.plot_intermediate_values,
    }
    if len(study.best_params) > 1:
        plots |= {"parallel": drawn.plot_parallel_coordinate, "contour": drawn.plot_contour}
    found = []
    for name, draw in plots.items():
        found.append(out / f"{name}.png")
        _save(draw, study, found[-1])
    return found


def _save(draw: Callable[[optuna.Study], Any], study: optuna.Study, path: Path) -> None:
    import matplotlib as mpl

    before = mpl.get_backend(auto_select=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna's warning that this backend is experimental
        mpl.use("agg")
        import matplotlib.pyplot as plt

        axes = draw(study)
        first = axes.flat[0] if hasattr(axes, "flat") else axes
        first.figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(first.figure)
        if before is not None:
            mpl.use(before)
