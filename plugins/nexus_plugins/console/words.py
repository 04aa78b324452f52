"""The console's text: progress, and numbers with significant digits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["done", "evaluated", "parts", "place", "share", "short"]

SPEED = "system/throughput_tokens_per_sec"
HASH = "weights/hash"
HEADLINE = "bits_per_byte"


def place(engine: Engine) -> str:
    """The progress of the run: the step, and the share of a horizon in another unit."""
    step = f"step {engine.state.step:,}"
    if engine.horizon is None:
        return step
    if engine.horizon.unit == "steps":
        return f"{step}/{engine.horizon.amount:,.0f}"
    return f"{step}  {share(engine):.1%} of {engine.horizon}"


def parts(metrics: Mapping[str, float]) -> Iterator[str]:
    """The parts of a log to show, most important first."""
    if "train/total_loss" in metrics:
        yield f"loss {_number(metrics['train/total_loss'])}"
    if HASH in metrics:
        yield f"weights {int(metrics[HASH]):012x}"
    if SPEED in metrics:
        yield f"{tqdm.format_sizeof(metrics[SPEED])} tok/s"
    if "train/learning_rate" in metrics:
        yield f"lr {metrics['train/learning_rate']:.2e}"


def evaluated(metrics: Mapping[str, float], *, verbose: bool) -> Iterator[str]:
    """The results of an evaluation, one line per set.

    Bits per byte come first and the loss last; loss terms and weighted totals are omitted unless
    `verbose`, or if there is nothing else.
    """
    best = sorted(metrics, key=lambda name: (not name.endswith(HEADLINE), name.endswith("/loss")))
    brief = [name for name in best if not name.endswith("_loss")]
    values: dict[str, list[str]] = {}
    for name in metrics if verbose else brief or metrics:
        of, _, what = name.rpartition("/")
        number = _number(metrics[name])
        said = f"{number} bits/byte" if what == HEADLINE else f"{what} {number}"
        values.setdefault(of, []).append(said)
    for of, said_of_it in values.items():
        yield f"{of}: {', '.join(said_of_it)}"


def _number(value: float) -> str:
    """A number with four digits; further digits of a mean over batches are noise."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def done(engine: Engine) -> float:
    """Progress in the horizon's unit, at most the horizon."""
    assert engine.horizon is not None
    return short(min(engine.state.counted(engine.horizon.unit), engine.horizon.amount))


def short(number: float) -> float:
    """A number without the spurious digits of a quotient."""
    return int(number) if number == int(number) else round(number, 2)


def share(engine: Engine) -> float:
    """The fraction of the run that is done; 0 without a horizon."""
    return engine.horizon.progress(engine.state) if engine.horizon else 0.0
