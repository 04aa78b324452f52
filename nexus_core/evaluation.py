"""An evaluation as a scope that restores everything on exit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from nexus_core.batches import Batch, to_device
from nexus_core.cells import dealt, divided, seed_for
from nexus_core.device import random_state, seed_everything, set_random_state
from nexus_core.errors import ConfigError, DataError
from nexus_core.events import Run
from nexus_core.loaders import check_batches
from nexus_core.optimizers import members, trained
from nexus_core.processes import gather
from nexus_core.step import merge, metric_name

__all__ = [
    "GivenUpError",
    "collect",
    "evaluating",
    "measure",
    "named_sets",
    "predict",
    "say_mode",
    "train_mode",
]


@contextmanager
def evaluating(engine: Run, *, nested: bool) -> Iterator[None]:
    """Evaluation mode, with weights that plugins swap in, fully restored afterwards.

    Modules are switched with `eval()` and `train()`, and each gets its previous mode back. A
    nested evaluation uses the weights of the outer one.
    """
    modes = [(module, module.training) for module in engine.model.modules()]
    generators = random_state()
    with ExitStack() as scope:
        scope.callback(set_random_state, generators)
        if not nested:
            scope.enter_context(_averaged_weights(engine))
            for context in engine.hook.evaluating(engine=engine):
                scope.enter_context(context)
        scope.callback(_set_modes, modes)
        if any(mode for _, mode in modes):
            engine.model.eval()
        yield


def named_sets(data: Iterable[Batch] | Mapping[str, Iterable[Batch]]) -> Mapping[str, Any]:
    """Evaluation data sets by name; a single one is "val".

    Raises:
        ConfigError: they are a list, which would be one set of batches, or yield rows.
    """
    if isinstance(data, list | tuple) and any(isinstance(s, DataLoader | Dataset) for s in data):
        raise ConfigError(
            "several evaluation data sets need names, got a list; write {'val': one, 'test': other}"
        )
    sets = data if isinstance(data, Mapping) else {"val": data}
    for one in sets.values():
        check_batches(one)
    return sets


class GivenUpError(Exception):
    """An evaluation ends early because the run must stop at once."""


def measure(
    engine: Run, split: str, data: Iterable[Batch], gives_up: Callable[[int | None], bool]
) -> dict[str, float]:
    """Every loss term and metric of one data set, weighted by units, within `evaluating`.

    Args:
        engine: with a separate meter for this set.
        split: the prefix of the metrics.
        gives_up: whether to stop here; called with each batch's number before it is measured, and
            with None after the last.
        data: batches; those in which this rank has no row of its own do not count.

    Raises:
        DataError: there is no batch with units of a loss.
        GivenUpError: `gives_up` returned True.
    """
    seed_everything(engine.seed)
    hook, seen, differentiates = engine.hook, set[str](), False
    for batch, borrowed in _parts(engine, data, gives_up):
        with engine.meter.counting(not borrowed):
            units = merge(hook.loss_units(engine=engine, batch=batch, step=None))
            moved, mark = to_device(batch, engine.device), engine.meter.mark()
            try:
                with torch.set_grad_enabled(differentiates):
                    terms = _terms(engine, moved)
            except RuntimeError as error:
                if differentiates or "does not require grad" not in str(error):
                    raise
                differentiates = True  # the loss does: a gradient penalty, a PDE residual
                engine.meter.rollback(mark)
                with torch.enable_grad():
                    terms = _terms(engine, moved)
            for name, term in terms.items():
                engine.meter.add(metric_name(split, name), term.detach(), units[name])
        seen |= terms.keys()
    if engine.cells:
        seed_for(engine.seed, "evaluated", split)
    if gives_up(None):
        raise GivenUpError
    metrics = engine.meter.read(engine.ranks)
    metrics |= _totals(engine, split, seen, metrics)
    with torch.no_grad():
        for answer in hook.measure(engine=engine, split=split, data=data):
            metrics |= answer
    return metrics


@torch.no_grad()
def predict(engine: Run, forward: Callable[..., Any], data: Iterable[Batch]) -> list[Any]:
    """The outputs for the batches in order, on the CPU, within `evaluating`.

    Args:
        engine: its ranks exchange outputs if each reads a share of every batch.
        forward: the hook that returns the model's output.
        data: batches.

    Raises:
        ConfigError: it yields rows, or no batches.
        DataError: each rank reads its own rows, in an order unknown to the others.
    """
    check_batches(data)
    seed_everything(engine.seed)
    outputs: list[Any] = []
    divided = getattr(data, "ranks", None)
    if getattr(getattr(data, "sampler", None), "num_replicas", 1) > 1:
        raise DataError(
            "a sampler distributes the rows of this data over processes, so their order is not "
            "known; read all of it in each, or use ResumableLoader(..., ranks=engine.ranks)"
        )
    for batch, borrowed in _with_borrowed(data):
        output = forward(engine=engine, batch=to_device(batch, engine.device), step=None)
        outputs.append([] if borrowed else [to_device(output, torch.device("cpu"))])
    shares = gather(divided, outputs) if divided is not None and divided.size > 1 else [outputs]
    return [one for batches in zip(*shares, strict=True) for share in batches for one in share]


def _parts(
    engine: Run, data: Iterable[Batch], gives_up: Callable[[int | None], bool]
) -> Iterator[tuple[Batch, bool]]:
    """Each batch to compute, whole or cell by cell, and whether its rows are borrowed.

    Raises:
        GivenUpError: `gives_up` returned True, called before each batch.
    """
    ours = dealt(data, engine.cells, engine.ranks.size)
    for number, (batch, borrowed) in enumerate(_with_borrowed(ours)):
        if gives_up(number):
            raise GivenUpError
        if not engine.cells:
            yield batch, borrowed
            continue
        part = divided(batch, engine.cells)
        for cell, one, rows in zip(count(part.first), part.batches, part.rows, strict=False):
            seed_for(engine.seed, "evaluate", number, cell)
            yield one, rows == 0


def _with_borrowed(data: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Batches, and for each whether all its rows are borrowed from other ranks."""
    borrowed = getattr(data, "is_borrowed", lambda row: False)
    rows = getattr(data, "batch_size", None) or 0  # a DataLoader of batches has none
    for number, batch in enumerate(data):
        yield batch, borrowed(number * rows)


def train_mode(optimizer: Optimizer) -> None:
    """Switch an optimizer with its own modes (such as schedule-free ones) to training."""
    for member in members(optimizer).values():
        if callable(train := getattr(member, "train", None)):
            train()


def collect(engine: Run) -> dict[str, float]:
    """Read the training metrics since the last log; they stay unread if a plugin fails."""
    sums = engine.meter.state_dict()
    if not (metrics := engine.meter.read(engine.ranks)):
        return {}
    metrics["train/learning_rate"] = float(engine.optimizer.param_groups[0]["lr"])
    try:
        for answer in engine.hook.collect_metrics(engine=engine):
            metrics |= answer
    except BaseException:
        engine.meter.load_state_dict(sums)
        raise
    return metrics


def say_mode(model: nn.Module) -> None:
    """Warn if a model is about to be trained in evaluation mode."""
    if not model.training:
        warnings.warn(
            "the model is in evaluation mode and trains that way: without dropout, and with frozen "
            "running statistics; call model.train() if that is not intended",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def _averaged_weights(engine: Run) -> Iterator[None]:
    """Evaluate with the optimizer's averaged weights, then restore the others exactly."""
    modal = [m for m in members(engine.optimizer).values() if callable(getattr(m, "eval", None))]
    live = [p for member in modal for p in trained(member)]
    before = [parameter.detach().clone() for parameter in live]
    for member in modal:
        cast(Any, member).eval()
    try:
        yield
    finally:
        train_mode(engine.optimizer)
        with torch.no_grad():
            for parameter, value in zip(live, before, strict=True):
                parameter.copy_(value)


def _terms(engine: Run, batch: Batch) -> dict[str, Tensor]:
    output: Any = engine.hook.forward(engine=engine, batch=batch, step=None)
    return merge(engine.hook.loss_terms(engine=engine, batch=batch, output=output, step=None))


def _totals(
    engine: Run, split: str, terms: set[str], metrics: Mapping[str, float]
) -> dict[str, float]:
    names = sorted(name for name in terms if metric_name(split, name) in metrics)
    if not names:
        raise DataError(
            f"the evaluation data '{split}' has no batch with loss units; add some, remove "
            "it, or pass data that can be read again"
        )
    weights = merge(engine.hook.loss_weight(engine=engine))
    total = sum(weights.get(name, 1.0) * metrics[metric_name(split, name)] for name in names)
    return {f"{split}/loss": metrics.get(f"{split}/loss", total), f"{split}/total_loss": total}


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Restore every module's mode, from the model down: `train` also sets children."""
    for module, mode in modes:
        if module.training != mode:
            module.train(mode)
