"""The core's defaults: the last implementation of every seam."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_core.batches import Batch, batch_size
from nexus_core.cells import CellSum
from nexus_core.errors import CheckpointError, ConfigError, DataError, hint_value
from nexus_core.events import Run
from nexus_core.optimizers import members, needs_closure, trained, update
from nexus_core.plugin import Plugin, PluginConfig, hookimpl
from nexus_core.processes import Ranks
from nexus_core.step import Step, merge
from nexus_core.update import accumulate_gradient

__all__ = ["Defaults", "FunctionLossPlugin"]

_TARGETS = ("target", "targets", "label", "labels", "y", "y_true")
_MISSING = "no {what}: pass it to {where}, or add a plugin for it (nexus-plugins list)"


class Defaults:
    """The core's own implementations, called after those of every plugin.

    Those called at each step take every argument: without plugins the call is direct.
    """

    @hookimpl(trylast=True)
    def make_data(self) -> NoReturn:
        raise DataError(_MISSING.format(what="training data", where="fit(...)"))

    @hookimpl(trylast=True)
    def make_model(self) -> NoReturn:
        raise ConfigError(_MISSING.format(what="model", where="Engine(...)"))

    @hookimpl(trylast=True)
    def make_optimizer(self) -> NoReturn:
        raise ConfigError(_MISSING.format(what="optimizer", where="Engine(...)"))

    @hookimpl(trylast=True)
    def load_snapshot(self, source: str) -> NoReturn:
        raise CheckpointError(
            f"cannot resume from '{source}': no plugin of this run reads checkpoints; add one that "
            "does (nexus-plugins list)"
        )

    @hookimpl(trylast=True)
    def cut_batch(self, engine: Run, batch: Batch) -> tuple[Batch]:
        return (batch,)

    @hookimpl(trylast=True)
    def take_turns(self, engine: Run, step: Step) -> tuple[None]:
        return (None,)

    @hookimpl(trylast=True)
    def forward(self, engine: Run, batch: Batch) -> Any:
        if isinstance(batch, Mapping):
            return engine.model(**accepted(engine.model, batch))
        return engine.model(batch[0] if isinstance(batch, list | tuple) else batch)

    @hookimpl(trylast=True)
    def weigh_losses(self, engine: Run, terms: tuple[str, ...], step: Step) -> dict[str, float]:
        return merge(engine.hook.loss_weight(engine=engine))

    @hookimpl(trylast=True)
    def accumulate_gradient(self, engine: Run, step: Step) -> bool:
        accumulate_gradient(engine, step)
        return True

    @hookimpl(trylast=True)
    def backward(self, engine: Run, loss: Tensor, terms: Mapping[str, Tensor], step: Step) -> bool:
        loss.backward()  # type: ignore[no-untyped-call]
        return True

    @hookimpl(trylast=True)
    def sum_cells(self, engine: Run, part: CellSum) -> list[Tensor | None]:
        if engine.ranks.size > 1:
            raise ConfigError(
                "no plugin of this run sums cells over processes; leave cells out, or train in one"
            )
        return part.total()

    @hookimpl(trylast=True)
    def optimizer_step(self, engine: Run, step: Step, again: Callable[[], Tensor]) -> bool:
        for optimizer in members(engine.optimizer, step.turn).values():
            if needs_closure(optimizer):
                _step_with_closure(optimizer, engine.ranks, step.total, again)
            else:
                update(optimizer)
            step.applied = True
        return True


def _step_with_closure(
    optimizer: Optimizer, ranks: Ranks, loss: Tensor, again: Callable[[], Tensor]
) -> None:
    """The closure's first result is what the step has already computed.

    All ranks see the loss summed over all of them, so that their searches agree. An error during
    the search leaves weights and state unchanged.
    """
    first = [loss]

    def closure() -> float:
        return ranks.sum(first.pop() if first else again()).item()

    weights = [(p, p.detach().clone()) for p in trained(optimizer)]
    state = deepcopy(optimizer.state_dict())
    try:
        optimizer.step(closure)
    except BaseException:
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
        optimizer.load_state_dict(state)
        raise


class FunctionLossPlugin(Plugin[PluginConfig]):
    """The term `loss` of an embedded engine: a function of model and batch that returns a mean.

    Micro-batches have equal weight; if they hold unequal numbers of labels, use a `Loss`, which is
    exact. Parts of a cut batch are weighted by their rows, as are evaluation batches: the mean does
    not depend on batch size or number of ranks.

    A function of `(input, target)`, such as `torch.nn.CrossEntropyLoss()`, compares the model's
    output for the first element of a pair with the second. It is recognized by the name of its
    second argument: `target`, `label` or `y`.
    """

    name = "loss"

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = _on_pairs(function) if _compares(function) else function

    @hookimpl
    def forward(self, engine: Run, batch: Batch) -> Tensor:
        loss = self._function(engine.model, batch)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss
        raise ConfigError(
            "loss(model, batch) must return a tensor of one number, got ", hint_value(loss)
        )

    @hookimpl
    def loss_units(self, batch: Batch, step: Step | None) -> dict[str, float]:
        return {"loss": step.share if step else float(batch_size(batch)[0])}

    @hookimpl
    def loss_terms(self, batch: Batch, output: Tensor, step: Step | None) -> dict[str, Tensor]:
        share = step.share if step else float(batch_size(batch)[0])
        return {"loss": output if share == 1.0 else output * share}


def _compares(function: Callable[..., Tensor]) -> bool:
    """Whether a loss takes (output, target) rather than (model, batch).

    Raises:
        ConfigError: it takes neither, or does not average.
    """
    reduction = getattr(function, "reduction", "mean")
    if isinstance(function, type) or not callable(function) or "mean" not in str(reduction):
        raise ConfigError(
            f"loss must return a mean, got {function!r:.99}; give an object that averages, such as "
            "torch.nn.CrossEntropyLoss()"
        )
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        names = [*inspect.signature(called).bind("model", "batch").arguments]
    except ValueError:  # implemented in C
        return False
    except TypeError:
        raise ConfigError(
            f"loss={function!r:.99} takes "
            f"({', '.join(inspect.signature(called).parameters)}), and is called with "
            "(model, batch), or with (input, target) on batches that are pairs; write a function "
            "of model and batch that calls it: def loss(model, batch): ..."
        ) from None
    return names[-1] in _TARGETS and names[0] != "model"


def _on_pairs(compare: Callable[[Any, Any], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ConfigError(
                f"loss={compare!r:.99} takes (input, target), and a batch is "
                f"{type(batch).__name__}; expected a pair (input, target), or write "
                "loss=lambda model, batch: ..."
            )
        return compare(model(batch[0]), batch[1])

    return loss


def accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that match parameters of the model's `forward`."""
    compiled = getattr(model, "_orig_mod", model)  # torch.compile hides the parameters' names
    parameters = inspect.signature(compiled.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(batch)
    return {key: value for key, value in batch.items() if key in parameters}
