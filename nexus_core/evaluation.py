"""An evaluation as a scope that is always left the way it was entered."""

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
    """Evaluation mode, with what plugins put in place of the weights, and no trace afterwards.

    Modules are switched as PyTorch does it, by `eval()` and `train()`, and each gets its own mode
    back. Within another evaluation the weights are those of that one.
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
    """Data sets to evaluate on by their names; one alone is "val".

    Raises:
        ConfigError: they are a list, which would be one set of batches, or give rows.
    """
    if isinstance(data, list | tuple) and any(isinstance(s, DataLoader | Dataset) for s in data):
        raise ConfigError(
            "several data sets to evaluate on go by name, and here is a list of them; write "
            "{'val': one, 'test': other}"
        )
    sets = data if isinstance(data, Mapping) else {"val": data}
    for one in sets.values():
        check_batches(one)
    return sets


class GivenUpError(Exception):
    """An evaluation ends early, as the run is to stop at once."""


def measure(
    engine: Run, split: str, data: Iterable[Batch], gives_up: Callable[[int | None], bool]
) -> dict[str, float]:
    """Every loss term and metric of one data set, weighted by units, within `evaluating`.

    Args:
        engine: with a meter of its own for this set.
        split: the prefix of the metrics.
        gives_up: whether to end here, asked with the number of each batch before it is measured,
            and with None after the last.
        data: batches; those in which this process has no row of its own do not count.

    Raises:
        DataError: there is no batch with units of a loss.
        GivenUpError: `gives_up` says so.
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
                differentiates = True  # the loss does: a gradient penalty, an equation of physics
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
    """The outputs for batches in their order, on the host, within `evaluating`.

    Args:
        engine: whose processes exchange what each has, where each reads a share of every batch.
        forward: the hook, giving what the model does.
        data: batches.

    Raises:
        DataError: each process reads its own rows, in an order that others cannot know.
    """
    seed_everything(engine.seed)
    outputs: list[Any] = []
    divided = getattr(data, "ranks", None)
    if getattr(getattr(data, "sampler", None), "num_replicas", 1) > 1:
        raise DataError(
            "a sampler deals the rows of this data out to processes, so that no order of them can "
            "be told; read it whole in each, or by ResumableLoader(..., ranks=engine.ranks)"
        )
    for batch, borrowed in _with_borrowed(data):
        output = forward(engine=engine, batch=to_device(batch, engine.device), step=None)
        outputs.append([] if borrowed else [to_device(output, torch.device("cpu"))])
    shares = gather(divided, outputs) if divided is not None and divided.size > 1 else [outputs]
    return [one for batches in zip(*shares, strict=True) for share in batches for one in share]


def _parts(
    engine: Run, data: Iterable[Batch], gives_up: Callable[[int | None], bool]
) -> Iterator[tuple[Batch, bool]]:
    """What is computed of the batches, whole or cell by cell, and whether its rows are another's.

    Raises:
        GivenUpError: `gives_up` says so, asked before each batch.
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
    """Batches, and of each whether this process has no row of its own in it."""
    borrowed = getattr(data, "is_borrowed", lambda row: False)
    rows = getattr(data, "batch_size", None) or 0  # a DataLoader of batches has none
    for number, batch in enumerate(data):
        yield batch, borrowed(number * rows)


def train_mode(optimizer: Optimizer) -> None:
    """Switch an optimizer that has a mode of its own (schedule-free ones do) to training."""
    for member in members(optimizer).values():
        if callable(train := getattr(member, "train", None)):
            train()


def collect(engine: Run) -> dict[str, float]:
    """The training metrics since the last log, read; they stay unread where a plugin fails."""
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
    """Say where a model is about to be trained in evaluation mode."""
    if not model.training:
        warnings.warn(
            "the model is in evaluation mode, and trains so: without dropout, and with running "
            "statistics as they are; call model.train() if that is not wanted",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def _averaged_weights(engine: Run) -> Iterator[None]:
    """Evaluate with the weights that such an optimizer means, and bring the others back exactly."""
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
            f"the evaluation data '{split}' holds no batch with units of a loss; add some, leave "
            "it out, or pass data that can be read again"
        )
    weights = merge(engine.hook.loss_weight(engine=engine))
    total = sum(weights.get(name, 1.0) * metrics[metric_name(split, name)] for name in names)
    return {f"{split}/loss": metrics.get(f"{split}/loss", total), f"{split}/total_loss": total}


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Give every module its mode back, from the model down: `train` sets those below too."""
    for module, mode in modes:
        if module.training != mode:
            module.train(mode)
