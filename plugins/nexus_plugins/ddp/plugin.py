"""Trains one model on several processes that each hold all of it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from nexus_core import ConfigError, hookimpl
from nexus_core.bases.parallel import Parallel
from nexus_core.errors import hint_set
from nexus_core.processes import is_sharded
from nexus_plugins._shared.buffers import share_buffers
from nexus_plugins._shared.cell_sums import sum_over_processes
from nexus_plugins.ddp.cells import CellGradients
from nexus_plugins.ddp.config import DdpConfig

if TYPE_CHECKING:
    from nexus_core import Engine, Step
    from nexus_core.cells import CellSum

__all__ = ["DdpPlugin"]


class DdpPlugin(Parallel[DdpConfig]):
    """Gives each rank its slice of every batch, and sums the gradients.

    The batch size in the config is the global one. Losses and gradients are those
    of one process with the same batch, since the engine divides by the units of all ranks.
    Gradients are reduced during the backward pass of a step's last micro-batch only. Without a
    launcher (`torchrun`) the plugin has no effect.

    Source: Li et al. 2020, "PyTorch Distributed"; `torch.nn.parallel.DistributedDataParallel`,
    with a communication hook that sums instead of averaging.
    """

    config_class = DdpConfig
    api_version: ClassVar[str] = "1.2"
    _parallel: DistributedDataParallel | None = None
    _first_step: bool = True
    _summed: bool = False
    _cells: CellGradients | None = None
    _names: Mapping[str, Tensor] = MappingProxyType({})

    def __post_init__(self) -> None:
        self.topology_invariant = self.config.sum != "ring"  # type: ignore[misc]  # of this one

    @hookimpl(stage="join")
    def on_start(self, engine: Engine) -> None:
        """Broadcast the weights of rank 0."""
        Parallel.on_start(self, engine)
        if self.config.sum == "tree" and not engine.cells:
            raise ConfigError("ddp.sum=tree needs cells; set cells (8), or remove it")
        if engine.ranks.size > 1:
            share_buffers(engine.model)
        if engine.ranks.size > 1 and not engine.cells:
            self._first_step = self.config.find_unused is None
            self._names = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
            self._parallel = self._wrapped(engine.model, bool(self.config.find_unused))
            _sum_gradients(self._parallel, _trained(engine.model))  # determines the buckets
            engine.optimizer.zero_grad()

    @hookimpl(wrapper=True, stage="reduce")
    def backward(self, engine: Engine, loss: Tensor, step: Step) -> Generator[None, bool, bool]:
        """Reduce the gradients over ranks during the last micro-batch's backward pass.

        Raises:
            ConfigError: optimizers take turns, or layers used earlier are no longer used.
        """
        if step.cells and engine.ranks.size > 1:
            with self._in_cells(engine, step).taking(step, engine.batch_cells):
                return (yield)
        if self._parallel is None:
            return (yield)
        if step.turn is not None:
            raise ConfigError(
                f"ddp sums one gradient per step, but optimizers take turns here ('{step.turn}'); "
                "train in one process, or with one optimizer"
            )
        if self._first_step:
            return (yield)
        self._summed = False
        with nullcontext() if step.is_last else self._parallel.no_sync():
            self._parallel(loss)
            done = yield
        if step.is_last and not self._summed:
            raise self._unreached(step)
        return done

    def _sum(self, bucket: torch._C._distributed_c10d.GradBucket) -> Future[Tensor]:
        """Sum some gradients over ranks; `DDP` reports the last ones of a step at the end."""
        self._summed = bucket.is_last()
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        future: Future[list[Tensor]] = work.get_future()
        return future.then(lambda done: done.value()[0])

    def _unreached(self, step: Step) -> ConfigError:
        """The error if this rank's step waits for gradients that never arrive."""
        assert self._parallel is not None
        found = [name for name, p in self._names.items() if p.grad is None]
        some = f" (such as '{found[0]}', one of {len(found)})" if found else ""
        return ConfigError(
            f"ddp: in step {step.number} the loss does not reach all parameters that it reached "
            f"before{some}; try ",
            hint_set("ddp.find_unused", True),
        )

    @hookimpl
    def sum_cells(self, engine: Engine, step: Step, part: CellSum) -> list[Tensor | None] | None:
        """Sum the cells of all ranks in tree order, or as the backend does."""
        if engine.ranks.size == 1:
            return None
        taken, count = self._cells, engine.batch_cells
        if taken is not None and taken.is_of(part):
            return taken.total(part, step, count)
        ring = self.config.sum == "ring"
        return sum_over_processes(part, step, count, engine.ranks, self._bucket, ring=ring)

    def _in_cells(self, engine: Engine, step: Step) -> CellGradients:
        """The object that sums the gradients of the current parameters."""
        own = [p for p in engine.parameters() if not is_sharded(p)]
        if step.place == 0 and not (self._cells and self._cells.is_for(own)):
            self._stop_taking()
            names = {id(p): name for name, p in engine.model.named_parameters()}
            named = [(names.get(id(p), str(tuple(p.shape))), p) for p in own]
            ring = self.config.sum == "ring"
            self._cells = CellGradients(named, engine.ranks, self._bucket, ring=ring)
        assert self._cells is not None
        return self._cells

    def _stop_taking(self) -> None:
        if self._cells is not None:
            self._cells.close()
        self._cells = None

    @hookimpl(stage="reduce")
    def after_backward(self, engine: Engine) -> None:
        """In the first step, reduce here, and find the parameters that the loss does not reach."""
        if self._parallel is not None and self._first_step:
            self._first_step = False
            parameters = _trained(engine.model)
            found = torch.tensor([float(p.grad is not None) for p in parameters])
            reached = [p for p, n in zip(parameters, engine.ranks.sum(found), strict=True) if n]
            if len(reached) < len(parameters):
                self._parallel = self._wrapped(engine.model, find_unused=True)
            _sum_gradients(self._parallel, reached)

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        """Broadcast the running statistics of rank 0."""
        if engine.ranks.size > 1:
            share_buffers(engine.model)

    @hookimpl
    def on_close(self) -> None:
        """Restore the model."""
        self._parallel, self._names = None, {}
        self._stop_taking()

    @property
    def _bucket(self) -> float:
        """The bucket size in bytes."""
        return self.config.bucket_mb * 2**20

    def _wrapped(self, model: nn.Module, find_unused: bool) -> DistributedDataParallel:
        parallel = DistributedDataParallel(
            _LossOf(model), bucket_cap_mb=self.config.bucket_mb, find_unused_parameters=find_unused
        )
        parallel.register_comm_hook(None, lambda state, bucket: self._sum(bucket))
        return parallel


class _LossOf(nn.Module):
    """A module with the model's parameters, but not its buffers, that passes a loss through.

    This shows DDP the loss, whichever functions of the model and the plugins computed it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(model.parameters())

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _sum_gradients(parallel: DistributedDataParallel, parameters: list[Tensor]) -> None:
    """Sum existing gradients through the backward pass of a zero loss.

    So they are added in the same order as in any other step, with bitwise equal results.
    """
    if parameters:
        nothing = torch.stack([p.sum().float() for p in parameters]).sum() * 0.0
        parallel(nothing)
        nothing.backward()  # type: ignore[no-untyped-call]
