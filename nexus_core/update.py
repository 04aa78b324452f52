"""What a step does: the gradient of its micro-batches, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add

import torch
from torch import Tensor

from nexus_core.batches import batch_size, fresh, to_device
from nexus_core.data import Micro
from nexus_core.device import Undo
from nexus_core.events import Run
from nexus_core.optimizers import clear_gradients, set_rates
from nexus_core.step import Numbers, Step, merge, metric_name, sum_units

__all__ = [
    "accumulate_gradient",
    "compute_gradient",
    "count_units",
    "leaving_no_trace",
    "prepare",
    "take_step",
]


def prepare(engine: Run, micro: Sequence[Micro]) -> Step:
    """A step over micro-batches as the data gave them: each through `on_batch` and `cut_batch`."""
    parts: list[Micro] = []
    for one in micro:
        batch = engine.hook.on_batch(engine=engine, batch=fresh(one.batch))
        cut = engine.hook.cut_batch(engine=engine, batch=batch)
        if len(cut) == 1:
            parts.append(one if cut[0] is one.batch else Micro(cut[0], borrowed=one.borrowed))
            continue
        rows = batch_size(batch)[0]
        parts += [Micro(part, batch_size(part)[0] / rows, one.borrowed) for part in cut]
    return Step(engine.state.step + 1, tuple(parts))


def take_step(
    engine: Run,
    step: Step,
    about_to_update: Callable[[], None] = lambda: None,
    between_turns: Callable[[], None] = lambda: None,
) -> None:
    """Train on one step, in all its turns that have not been.

    Args:
        engine: whose weights are updated.
        step: as `prepare` gives it.
        about_to_update: called when the last gradient is complete.
        between_turns: called after the update of each turn but the last.
    """
    step.turns = step.turns or tuple(engine.hook.take_turns(engine=engine, step=step))
    for place in range(step.turns_done, len(step.turns)):
        step.turn, step.applied = step.turns[place], False
        is_last = place == len(step.turns) - 1
        try:
            _take_turn(engine, step, about_to_update if is_last else None)
        finally:
            step.turns_done += step.applied
            if step.applied and not is_last:
                between_turns()


def count_units(engine: Run, step: Step) -> None:
    """Count the units of the step's turn, over all its micro-batches, and weigh its terms."""
    counts: list[Numbers] = []
    for place, micro in enumerate(step.micro):
        step.place = place
        found = merge(engine.hook.loss_units(engine=engine, batch=micro.batch, step=step))
        counts.append({n: u * 0.0 for n, u in found.items()} if micro.borrowed else found)
    step.counts = tuple(counts)
    step.units = sum_units(counts, engine.ranks)
    step.weights = engine.hook.weigh_losses(engine=engine, terms=tuple(step.units), step=step)


def compute_gradient(engine: Run, step: Step) -> None:
    """Compute the gradient of the step's turn, and hand it to `after_backward`."""
    accumulate_gradient(engine, step)
    engine.hook.after_backward(engine=engine, step=step)


def accumulate_gradient(engine: Run, step: Step) -> None:
    """Add up the gradient of the step's turn, micro-batch by micro-batch, and record its terms.

    The copy of the next micro-batch to the device is queued before the present one is computed.
    """
    clear_gradients(engine.optimizer, engine.untrained())
    for name in step.units:
        step.losses.pop(name, None)
    ahead = to_device(step.micro[0].batch, engine.device)
    for place in range(len(step.micro)):
        step.place, batch = place, ahead
        if place + 1 < len(step.micro):
            ahead = to_device(step.micro[place + 1].batch, engine.device)
        _backward(engine, step, batch)
    if step.turn is not None:
        _clear_other_turns(engine, step.turn)


@contextmanager
def leaving_no_trace(engine: Run) -> Iterator[None]:
    """Compute on the side: generators, buffers, gradients and metrics are put back."""
    mark, undo = engine.meter.mark(), Undo(engine.model)
    gradients = [(parameter, parameter.grad) for parameter in engine.model.parameters()]
    clear_gradients(engine.optimizer, engine.untrained())
    try:
        yield
    finally:
        undo.put_back()
        engine.meter.rollback(mark)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _take_turn(engine: Run, step: Step, about_to_update: Callable[[], None] | None) -> None:
    count_units(engine, step)
    compute_gradient(engine, step)
    if scales := engine.hook.lr_scale(engine=engine):
        set_rates(engine.optimizer, math.prod(scales))

    def again() -> Tensor:
        mark, step.again = engine.meter.mark(), True
        try:
            with torch.enable_grad():
                compute_gradient(engine, step)
        finally:
            step.again = False
            engine.meter.rollback(mark)
        return step.total

    if about_to_update is not None:
        about_to_update()
    engine.hook.optimizer_step(engine=engine, step=step, again=again)
    step.applied = True


def _backward(engine: Run, step: Step, batch: object) -> None:
    """Add one micro-batch's share of the step's gradient, and record its terms."""
    hook, borrowed = engine.hook, step.micro[step.place].borrowed
    engine.meter.counts = not borrowed  # it logs alike in every process
    output = hook.forward(engine=engine, batch=batch, step=step)
    terms = merge(hook.loss_terms(engine=engine, batch=batch, output=output, step=step))
    if borrowed:
        terms = {name: term * 0.0 for name, term in terms.items()}
    counts = step.counts[step.place]
    shares = step.shares_of(terms)
    for name, term in terms.items():
        engine.meter.add(metric_name("train", name), term.detach(), counts[name])
    total = reduce(add, shares.values())
    hook.backward(engine=engine, loss=total, terms=shares, step=step)
    ends_step = step.is_last and engine.ranks.is_main
    engine.meter.add("train/total_loss", total.detach(), float(ends_step))
    engine.meter.counts = True


def _clear_other_turns(engine: Run, turn: str) -> None:
    """Leave no gradient on what another turn updates."""
    own = {id(parameter) for parameter in engine.parameters(turn)}
    for parameter in engine.parameters():
        if id(parameter) not in own:
            parameter.grad = None
