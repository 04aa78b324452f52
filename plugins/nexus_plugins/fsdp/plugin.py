"""Trains one model on several processes that each hold a shard of it."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from nexus_core import ConfigError, hookimpl
from nexus_core.bases.parallel import Parallel, launched
from nexus_core.optimizers import members
from nexus_core.processes import is_sharded
from nexus_plugins._shared.buffers import share_buffers
from nexus_plugins._shared.cell_sums import sum_over_processes
from nexus_plugins.fsdp.cells import CellReduction, sum_by_tree
from nexus_plugins.fsdp.config import FsdpConfig
from nexus_plugins.fsdp.shard import (
    divide,
    keep_weights_on_host,
    kept_whole,
    mark,
    marks,
    part_again,
    reached,
    split_groups,
    sum_gradients,
)

if TYPE_CHECKING:
    from nexus_core import Engine, Step
    from nexus_core.cells import CellSum

__all__ = ["FsdpPlugin"]

REGISTERS = 64
"""Elements in the widest vector register of the host's kernels."""
Metrics = list[Mapping[str, float]]


class FsdpPlugin(Parallel[FsdpConfig]):
    """Gives each rank its slice of every batch, and a shard of every weight.

    Weights, gradients and optimizer states are sharded over the ranks; a module's weights are
    gathered while it runs. Losses and gradients are those of one process with the same batch.
    Without a launcher (`torchrun`) the plugin has no effect.

    It conflicts with plugins that read whole weights or gradients (`weigh_gradnorm`, `grad_stats`,
    `diagnose`, `mfu`), with `optim_adamw8bit`, whose kernels do not support shards, and with
    `auto_accumulate`, under which ranks would gather weights a different number of times and
    deadlock.

    Source: Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP";
    `torch.distributed.fsdp.fully_shard`, summing gradients instead of averaging them.
    """

    config_class = FsdpConfig
    api_version: ClassVar[str] = "1.2"
    conflicts: ClassVar[tuple[str, ...]] = (
        "auto_accumulate", "diagnose", "grad_stats", "mfu", "optim_adamw8bit", "weigh_gradnorm",
    )  # fmt: skip
    _noticed: bool = False
    _scalars: list[nn.Parameter]
    _whole: list[nn.Parameter]
    _reductions: list[CellReduction]
    _marks: Mapping[str, Mapping[str, object]] = MappingProxyType({})

    def __post_init__(self) -> None:
        self.topology_invariant = self.config.sum != "ring"  # type: ignore[misc]  # of this one

    @hookimpl(wrapper=True)
    def make_model(self, engine: Engine) -> Generator[None, nn.Module, nn.Module]:
        """Shard the model over the ranks as soon as it is built."""
        self._check(engine)
        empty = launched() and self.config.build_once and not engine.ranks.is_main
        with _without_numbers() if empty else nullcontext():
            model = yield
        if launched():
            self._divide(model, engine)
        return model

    @hookimpl(wrapper=True)
    def make_optimizer(self, engine: Engine) -> Generator[None, Optimizer, Optimizer]:
        """Shard a model passed by the program, before the optimizer sees it."""
        self._check(engine)
        if launched():
            if not isinstance(engine.model, FSDPModule):
                self._divide(engine.model, engine)
            if self.config.offload:
                keep_weights_on_host(engine.model)
            mark(engine.model, self._marks)  # now, since moving a model also creates new parameters
        optimizer = yield
        if (width := self._width(engine)) > 1:
            whole = kept_whole(engine.model, width)
            for member in members(optimizer).values():
                split_groups(member, whole)
        return optimizer

    @hookimpl(stage="join")
    def on_start(self, engine: Engine) -> None:
        """Check that the model is sharded.

        Raises:
            ConfigError: the optimizer was created before the model could be sharded.
        """
        Parallel.on_start(self, engine)
        if self.config.sum == "tree" and (not engine.cells or self.config.reduce_at_end):
            raise ConfigError(
                "fsdp.sum=tree needs cells, reduced one at a time; set cells (8), and remove "
                "fsdp.reduce_at_end"
            )
        if engine.ranks.size == 1:
            return
        self._whole = kept_whole(engine.model, self._width(engine))
        if not isinstance(engine.model, FSDPModule):
            raise ConfigError(
                "fsdp must shard the model before its optimizer is created: pass the Engine no "
                "optimizer, and use an optimizer plugin (optim_adamw)"
            )
        self._noticed = False
        self._reductions = []
        if engine.cells and self.config.sum != "ring":
            self._reductions = sum_by_tree(engine.model, engine.ranks)
        self._scalars = [p for p in self._whole if p.requires_grad]

    @hookimpl(wrapper=True, stage="reduce")
    def backward(self, engine: Engine, step: Step) -> Generator[None, bool, bool]:
        """Reduce the gradients over ranks during the backward pass."""
        if not isinstance(engine.model, FSDPModule):
            return (yield)
        if step.turn is not None:
            raise ConfigError(
                f"fsdp supports one optimizer, but several take turns here ('{step.turn}')"
            )
        if step.place == 0:
            for reduction in self._reductions:
                reduction.begin(step, engine.batch_cells)
        if self.config.reduce_at_end:
            engine.model.set_requires_gradient_sync(step.is_last)
        whole = set(self._whole)
        gathered = [p for p in engine.model.parameters() if p not in whole and not is_sharded(p)]
        done = yield
        for parameter in gathered:  # FSDP adds a hook to a weight each time the model returns it
            (parameter._backward_hooks or {}).clear()
        return done

    @hookimpl
    def sum_cells(self, engine: Engine, step: Step, part: CellSum) -> list[Tensor | None] | None:
        """Sum the gradients that are not sharded over the cells of all ranks."""
        if engine.ranks.size == 1:
            return None
        ring = self.config.sum == "ring"
        return sum_over_processes(part, step, engine.batch_cells, engine.ranks, ring=ring)

    @hookimpl(stage="reduce")
    def after_backward(self, engine: Engine) -> None:
        """All-reduce the gradients of parameters that are not sharded."""
        if engine.ranks.size > 1:
            if not self._noticed:
                self._notice(engine)
            if self._scalars and not engine.cells:
                sum_gradients(reached(self._scalars, engine.ranks), engine.ranks)

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Broadcast the running statistics of rank 0."""
        if engine.ranks.size > 1:
            share_buffers(engine.model)

    @hookimpl
    def evaluating(self, engine: Engine) -> AbstractContextManager[object]:
        """Reshard the weights after an evaluation, before others see them."""
        return _parting(engine.model)

    @hookimpl(wrapper=True)
    def measure(self, engine: Engine) -> Generator[None, Metrics, Metrics]:
        """Reshard the weights after an evaluation set, before other plugins swap weights."""
        part_again(engine.model)
        return (yield)

    def _divide(self, model: nn.Module, engine: Engine) -> None:
        self._marks = marks(model)
        divide(model, self.config, engine.device, engine.ranks, self._width(engine))
        # Harmless here: the root module's weights stay gathered until its backward pass.
        kind = type(model).__name__
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({kind}\) returned a view")

    def _notice(self, engine: Engine) -> None:
        """After the first step, check that its backward pass reduced gradients.

        Raises:
            ConfigError: FSDP did not notice it, and has summed no gradient.
        """
        if not _is_parted(engine.model, self._whole):
            raise ConfigError(
                "fsdp finds no tensor in the model's output, so it cannot reduce the "
                "gradients; return tensors, in dicts, lists, tuples or dataclasses"
            )
        self._noticed = True

    def _width(self, engine: Engine) -> int:
        """The number that row sizes of sharded weights must be a multiple of."""
        steady = engine.cells and self.config.sum != "ring" and engine.device.type == "cpu"
        return REGISTERS if steady else 1

    def _check(self, engine: Engine) -> None:
        self.check_joined()
        if self.config.compute_dtype and self._width(engine) > 1:
            raise ConfigError(
                "fsdp.compute_dtype: on a CPU, a run in cells keeps some weights whole, in their "
                "own dtype; use amp instead, or set fsdp.sum to ring"
            )
        if self.config.offload and engine.device.type == "cpu":
            raise ConfigError("fsdp.offload: the weights are already in CPU memory; remove it")


def _is_parted(model: nn.Module, whole: list[nn.Parameter]) -> bool:
    """Whether the weights are sharded again, as they are after a backward pass."""
    kept = set(whole)
    return all(is_sharded(parameter) for parameter in model.parameters() if parameter not in kept)


@contextmanager
def _parting(model: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        part_again(model)


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Build a model on the meta device, without allocating weights."""
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, TypeError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"fsdp.build_once: the model cannot be built on the meta device ({said}); "
            "set fsdp.build_once=false"
        ) from error
