"""One step, one evaluation, and their algebra: sums over units, divided by those of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from nexus_core.data import Batch, batch_size, to_device
from nexus_core.errors import DataError, PluginError
from nexus_core.meter import Meter
from nexus_core.processes import Ranks
from nexus_core.state import random_state, seed_everything, set_random_state

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["backward", "measure", "merge", "metric_name", "take_step"]

Value = TypeVar("Value")
Numbers = Mapping[str, Tensor | float]


def take_step(engine: Engine, micro: Sequence[Batch]) -> None:
    """Train on one step's micro-batches, all of them on the device."""
    hook = engine.hook
    _clear_gradients(engine.optimizer)
    for batch in micro:
        hook.on_batch(engine=engine, batch=batch)
    counts = [merge(hook.loss_units(engine=engine, batch=batch)) for batch in micro]
    units = step_units(counts, engine.ranks)
    weights = hook.weigh_losses(engine=engine, terms=tuple(units))
    engine.losses, engine.refused = {}, None
    for place, batch in enumerate(micro, start=1):
        engine.last_micro_batch = place == len(micro)
        backward(engine, batch, counts[place - 1], units, weights)
    hook.after_backward(engine=engine)
    scales = hook.lr_scale(engine=engine)
    if scales:
        for group in engine.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * math.prod(scales)
    hook.optimizer_step(engine=engine)
    engine.state.step += 1
    for batch in micro:
        rows, tokens = batch_size(batch)
        engine.state.samples += rows
        engine.state.tokens += tokens
    hook.on_step(engine=engine)


def _clear_gradients(optimizer: Optimizer) -> None:
    """`zero_grad`, without what torch's own spends on profiling where nobody overrode it."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def backward(
    engine: Engine, batch: Batch, counts: Numbers, units: Numbers, weights: Numbers
) -> None:
    """Add one micro-batch's share of the step's gradient, and record its terms.

    Its own units of each term are `counts`, those of the whole step `units`.
    """
    output = engine.hook.forward(engine=engine, batch=batch)
    terms = merge(engine.hook.loss_terms(engine=engine, batch=batch, output=output))
    shares: dict[str, Tensor] = {}
    for name, term in terms.items():
        if name not in units:
            raise PluginError(f"loss term '{name}' has no units: answer loss_units for it too")
        mean = term if isinstance(units[name], float) and units[name] == 1.0 else term / units[name]
        weight = weights.get(name, 1.0)
        shares[name] = mean if isinstance(weight, float) and weight == 1.0 else mean * weight
        done = engine.losses.get(name)
        engine.losses[name] = mean.detach() if done is None else done + mean.detach()
        engine.meter.add(metric_name("train", name), term.detach(), counts[name])
    if not shares:
        raise PluginError("no plugin gave a loss term for this batch: answer loss_terms")
    total = reduce(add, shares.values())
    engine.hook.backward(engine=engine, loss=total, terms=shares)
    ends_step = engine.last_micro_batch and engine.ranks.is_main
    engine.meter.add("train/total_loss", total.detach(), float(ends_step))


def measure(engine: Engine, split: str, data: Iterable[Batch]) -> dict[str, float]:
    """Every loss term and metric of one data set, weighted by units (see `Engine.evaluate`)."""
    hook, seen = engine.hook, set[str]()
    with _evaluating(engine, split), torch.no_grad():
        for batch in data:
            batch = to_device(batch, engine.device)
            units = merge(hook.loss_units(engine=engine, batch=batch))
            output = hook.forward(engine=engine, batch=batch)
            terms = merge(hook.loss_terms(engine=engine, batch=batch, output=output))
            for name, term in terms.items():
                engine.meter.add(metric_name(split, name), term, units[name])
            seen |= terms.keys()
        metrics = engine.meter.read(engine.ranks)
    names = [name for name in seen if metric_name(split, name) in metrics]
    if not names:
        mend = "add some, leave it out, or pass data that can be read again"
        raise DataError(
            f"the evaluation data '{split}' holds no batch with units of a loss; {mend}"
        )
    weights = merge(hook.loss_weight(engine=engine))
    means = {name: metrics[metric_name(split, name)] for name in sorted(names)}
    metrics[f"{split}/total_loss"] = sum(weights.get(n, 1.0) * mean for n, mean in means.items())
    metrics.setdefault(f"{split}/loss", metrics[f"{split}/total_loss"])
    return metrics


@contextmanager
def _evaluating(engine: Engine, split: str) -> Iterator[None]:
    """Evaluation mode, with a meter and random numbers of its own."""
    modes = [(module, module.training) for module in engine.model.modules()]  # some are frozen
    meter, generators = engine.meter, random_state()
    engine.training, engine.split, engine.meter = False, split, Meter()
    engine.model.eval()
    seed_everything(engine.seed)
    try:
        yield
    finally:
        set_random_state(generators)
        for module, mode in modes:
            module.training = mode
        engine.training, engine.split, engine.meter = True, "train", meter


def metric_name(split: str, term: str) -> str:
    """The name under which a term is logged: `train/lm_loss` (the term `loss`: `train/loss`)."""
    return f"{split}/loss" if term == "loss" else f"{split}/{term}_loss"


def merge(answers: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """One dict of all plugins' terms; a term that two plugins give is an error."""
    merged: dict[str, Value] = {}
    for answer in answers:
        if twice := merged.keys() & answer.keys():
            raise PluginError(f"two plugins give the loss term '{min(twice)}'; rename one of them")
        merged.update(answer)
    return merged


def step_units(micro: Sequence[Numbers], ranks: Ranks) -> dict[str, Tensor | float]:
    """Units of each term over a step's micro-batches and all processes, at least one."""
    totals = dict(micro[0])
    for units in micro[1:]:
        totals.update({name: totals.get(name, 0.0) + count for name, count in units.items()})
    if ranks.size > 1:
        device = next((n.device for n in totals.values() if isinstance(n, Tensor)), None)
        names, double = sorted(totals), torch.float64
        counts = [torch.as_tensor(totals[n], dtype=double, device=device) for n in names]
        totals = dict(zip(names, ranks.sum(torch.stack(counts)).float(), strict=True))
    return {
        name: count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)
        for name, count in totals.items()
    }
