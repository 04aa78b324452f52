"""What a step does: the gradient of its micro-batches, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import count
from operator import add

import torch
from torch import Tensor, nn

from nexus_core.batches import batch_size, fresh, to_device
from nexus_core.cells import CellSum, divided, seed_for
from nexus_core.data import Micro
from nexus_core.device import Undo
from nexus_core.errors import ConfigError
from nexus_core.events import Run
from nexus_core.optimizers import clear_gradients, set_rates
from nexus_core.processes import is_sharded
from nexus_core.step import Numbers, Step, merge, metric_name, sum_units, sum_units_exactly

__all__ = [
    "accumulate_gradient",
    "compute_gradient",
    "count_units",
    "leaving_no_trace",
    "prepare",
    "take_step",
]


def prepare(engine: Run, micro: Sequence[Micro]) -> Step:
    """A step over micro-batches from the data, each passed through `on_batch` and `cut_batch`."""
    number, parts, cells = engine.state.step + 1, list[Micro](), list[int]()
    if engine.cells:
        micro = list(_cell_by_cell(engine, micro, cells))
    for one in micro:
        if one.cell is not None:
            seed_for(engine.seed, number, one.cell)
        batch = engine.hook.on_batch(engine=engine, batch=fresh(one.batch))
        cut = engine.hook.cut_batch(engine=engine, batch=batch)
        if len(cut) == 1:
            parts.append(one if cut[0] is one.batch else Micro(cut[0], *one[1:]))
            continue
        if one.cell is not None:
            raise ConfigError(
                "a plugin of this run splits batches to fit memory, and splitting a cell would "
                "change its result; remove the plugin, and set more cells instead"
            )
        rows = batch_size(batch)[0]
        parts += [Micro(part, batch_size(part)[0] / rows, one.borrowed) for part in cut]
    if engine.cells:
        seed_for(engine.seed, number, "step")
    return Step(number, tuple(parts), cells=tuple(cells))


def take_step(
    engine: Run,
    step: Step,
    about_to_update: Callable[[], None] = lambda: None,
    between_turns: Callable[[], None] = lambda: None,
) -> None:
    """Train on one step, in all its remaining turns.

    Args:
        engine: its weights are updated.
        step: from `prepare`.
        about_to_update: called when the last gradient is complete.
        between_turns: called after the update of each turn but the last.
    """
    step.turns = step.turns or tuple(engine.hook.take_turns(engine=engine, step=step))
    for place in range(step.turns_done, len(step.turns)):
        step.turn, step.applied = step.turns[place], False
        is_last = place == len(step.turns) - 1
        try:
            _take_turn(engine, step, about_to_update if is_last else lambda: None)
        finally:
            step.turns_done += step.applied
            if step.applied and not is_last:
                between_turns()


def count_units(engine: Run, step: Step) -> None:
    """Count the units of the step's turn over all its micro-batches, and set the term weights."""
    counts: list[Numbers] = []
    for place, micro in enumerate(step.micro):
        step.place = place
        found = merge(engine.hook.loss_units(engine=engine, batch=micro.batch, step=step))
        counts.append({n: u * 0.0 for n, u in found.items()} if micro.borrowed else found)
    step.counts = tuple(counts)
    step.units = (sum_units_exactly if step.cells else sum_units)(counts, engine.ranks)
    step.weights = engine.hook.weigh_losses(engine=engine, terms=tuple(step.units), step=step)


def compute_gradient(engine: Run, step: Step) -> None:
    """Compute the gradient of the step's turn, and call `after_backward`."""
    engine.hook.accumulate_gradient(engine=engine, step=step)
    engine.hook.after_backward(engine=engine, step=step)


def accumulate_gradient(engine: Run, step: Step) -> None:
    """Accumulate the gradient of the step's turn over its micro-batches, and record its terms.

    The copy of the next micro-batch to the device is queued before the current one runs.
    """
    clear_gradients(engine.optimizer, engine.untrained())
    for name in step.units:
        step.losses.pop(name, None)
    step.passes += 1
    own = [p for p in engine.parameters() if not is_sharded(p)] if step.cells else []
    summed = (
        CellSum(sum(step.cells), [*own, torch.zeros(len(step.units), device=engine.device)])
        if step.cells
        else None
    )
    ahead = to_device(step.micro[0].batch, engine.device)
    for place in range(len(step.micro)):
        step.place, batch = place, ahead
        if place + 1 < len(step.micro):
            ahead = to_device(step.micro[place + 1].batch, engine.device)
        if summed is not None:
            seed_for(engine.seed, step.number, step.micro[place].cell, step.passes)
        _backward(engine, step, batch)
        if summed is not None:
            _take_out(step, own, summed)
    if summed is not None:
        _put_back(engine, step, own, engine.hook.sum_cells(engine=engine, step=step, part=summed))
        seed_for(engine.seed, step.number, "pass", step.passes)
    if step.turn is not None:
        _clear_other_turns(engine, step.turn)


@contextmanager
def leaving_no_trace(engine: Run) -> Iterator[None]:
    """Compute without side effects: generators, buffers, gradients and metrics are restored."""
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


def _take_turn(engine: Run, step: Step, about_to_update: Callable[[], None]) -> None:
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

    about_to_update()
    engine.hook.optimizer_step(engine=engine, step=step, again=again)
    step.applied = True


def _backward(engine: Run, step: Step, batch: object) -> None:
    """Add one micro-batch's share of the step's gradient, and record its terms."""
    hook, borrowed = engine.hook, step.micro[step.place].borrowed
    meter, counted = engine.meter, engine.meter.counts
    meter.counts = not borrowed  # it logs alike on every rank
    try:
        output = hook.forward(engine=engine, batch=batch, step=step)
        terms = merge(hook.loss_terms(engine=engine, batch=batch, output=output, step=step))
        if borrowed:
            terms = {name: term * 0.0 for name, term in terms.items()}
        counts = step.counts[step.place]
        shares = step.shares_of(terms)
        for name, term in terms.items():
            meter.add(metric_name("train", name), term.detach(), counts[name])
        total = reduce(add, shares.values())
        hook.backward(engine=engine, loss=total, terms=shares, step=step)
        meter.add("train/total_loss", total.detach(), float(step.is_last and engine.ranks.is_main))
    finally:
        meter.counts = counted


def _cell_by_cell(engine: Run, micro: Sequence[Micro], cells: list[int]) -> Iterator[Micro]:
    """Each cell of some batches as a micro-batch; `cells` is filled with the counts."""
    for one in micro:
        part = divided(one.batch, engine.batch_cells)
        first = sum(cells) + part.first
        for cell, batch, rows in zip(count(first), part.batches, part.rows, strict=False):
            yield Micro(batch, float(rows), borrowed=rows == 0, cell=cell)
        cells.append(part.of)


def _take_out(step: Step, own: Sequence[nn.Parameter], summed: CellSum) -> None:
    """Move the gradients and losses of the current cell into the sum over cells."""
    found = [step.losses.pop(name, summed.like[-1][:1]) for name in step.units]
    values: list[Tensor | None] = [
        p.grad if p.grad is None or not p.grad.is_sparse else p.grad.coalesce() for p in own
    ]
    for parameter in own:
        parameter.grad = None
    micro = step.micro[step.place]
    if micro.cell is not None and not micro.borrowed:
        losses = torch.stack([loss.reshape(()).float() for loss in found])
        summed.add(micro.cell, [*values, losses])


def _put_back(
    engine: Run, step: Step, own: Sequence[nn.Parameter], values: Sequence[Tensor | None]
) -> None:
    """Set the gradients of the whole step on the parameters, and the losses on rank 0."""
    *gradients, losses = values
    for parameter, gradient in zip(own, gradients, strict=True):
        parameter.grad = gradient
    if losses is not None:
        shown = losses if engine.ranks.is_main else torch.zeros_like(losses)
        step.losses |= dict(zip(step.units, shown.unbind(), strict=True))


def _clear_other_turns(engine: Run, turn: str) -> None:
    """Clear gradients on parameters that another turn updates."""
    own = {id(parameter) for parameter in engine.parameters(turn)}
    for parameter in (p for p in engine.parameters() if id(p) not in own):
        parameter.grad = None
