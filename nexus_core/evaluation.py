"""Measure a model on data that it does not train on, without leaving a trace in the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nexus_core.errors import DataError
from nexus_core.loader import Batch, to_device
from nexus_core.meter import Meter
from nexus_core.state import random_state, seed_everything, set_random_state
from nexus_core.step import merge, metric_name

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["measure"]


def measure(engine: Engine, split: str, data: Iterable[Batch]) -> dict[str, float]:
    """Every loss term and metric of one data set, weighted by units (see `Engine.evaluate`)."""
    hook, units = engine.hook, None
    with _evaluating(engine, split), torch.no_grad():
        for batch in data:
            batch = to_device(batch, engine.device)
            units = merge(hook.loss_units(engine=engine, batch=batch))
            output = hook.forward(engine=engine, batch=batch)
            terms = merge(hook.loss_terms(engine=engine, batch=batch, output=output))
            for name, term in terms.items():
                engine.meter.add(metric_name(split, name), term, units[name])
        metrics = engine.meter.read(engine.ranks)
    if units is None:
        raise DataError(f"the evaluation data '{split}' holds no batch; add some or leave it out")
    weights = merge(hook.loss_weight(engine=engine))
    means = {name: metrics.get(metric_name(split, name), 0.0) for name in units}
    metrics[f"{split}/total_loss"] = sum(weights.get(n, 1.0) * mean for n, mean in means.items())
    metrics.setdefault(f"{split}/loss", metrics[f"{split}/total_loss"])
    return metrics


@contextmanager
def _evaluating(engine: Engine, split: str) -> Iterator[None]:
    """Evaluation mode, with a meter and random numbers of its own."""
    mode, meter, generators = engine.model.training, engine.meter, random_state()
    engine.training, engine.split, engine.meter = False, split, Meter()
    engine.model.eval()
    seed_everything(engine.seed)
    try:
        yield
    finally:
        set_random_state(generators)
        engine.model.train(mode)
        engine.training, engine.split, engine.meter = True, "train", meter
