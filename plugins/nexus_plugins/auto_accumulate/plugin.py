"""Trains on batches that do not fit into memory in one piece."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from operator import add
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import DataError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.batches import Batch, batch_size, to_device
from nexus_core.step import merge
from nexus_core.update import leaving_no_trace
from nexus_plugins.auto_accumulate import fit
from nexus_plugins.auto_accumulate.split import Rows, first_rows, is_splittable, parts

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["AutoAccumulateConfig", "AutoAccumulatePlugin"]

GIB = 2**30


class AutoAccumulateConfig(PluginConfig):
    """Settings of the search for the largest micro-batch."""

    rows: int | None = Field(
        default=None, ge=1, description="maximum rows per micro-batch; null: as many as fit"
    )
    limit: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="memory for the search, in GiB; null: all free memory",
    )
    margin: float = Field(default=0.1, ge=0, lt=1, description="share of this memory to keep free")


class AutoAccumulatePlugin(Plugin[AutoAccumulateConfig]):
    """Splits each batch into the largest micro-batches that fit into memory.

    The rows per step and the update do not change, up to rounding (and dropout, which is drawn per
    micro-batch). The search runs at the first step, and again when rows get longer: on CUDA by
    trying, from the whole batch down; on Linux without CUDA by measuring, from one row up;
    elsewhere only the whole batch is tried. Weights, gradients, buffers and random generators are
    restored. The result is saved with the run and kept on resume. `system/micro_batch_rows` is
    logged. Batches must be dicts of tensors.
    """

    config_class = AutoAccumulateConfig
    topology_invariant: ClassVar[bool] = False
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._rows = self.config.rows or 0
        self._tried_rows = self._tried_width = 0

    @hookimpl(stage="inspect")
    def on_batch(self, engine: Engine, batch: Batch) -> None:
        """Search, unless batches of this shape have been searched already.

        Raises:
            DataError: the batch is not a dict.
            RunError: not even one row fits.
        """
        if not is_splittable(batch):
            raise DataError(
                f"auto_accumulate needs batches that are dicts of tensors, such as "
                f"{{'input_ids': ...}}, got {type(batch).__name__}"
            )
        if self.config.rows is None:
            rows, width = batch_size(batch)[0], _width(batch)
            more = rows > self._tried_rows and self._rows == self._tried_rows
            if width > self._tried_width or more:
                self._rows = self._search(engine, batch, rows)
                self._tried_rows, self._tried_width = rows, width

    @hookimpl
    def cut_batch(self, batch: Batch) -> list[dict[str, object]] | None:
        """Split the batch if it has more rows than fit."""
        if self._rows == 0 or not is_splittable(batch) or batch_size(batch)[0] <= self._rows:
            return None
        return parts(batch, self._rows)

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The rows of a micro-batch."""
        return {"system/micro_batch_rows": float(self._rows)} if self._rows else {}

    def state_dict(self) -> StateDict:
        """The result, and the batches it applies to."""
        found = {"rows": self._rows, "of": self._tried_rows, "width": self._tried_width}
        return cast(StateDict, found) if self._tried_rows else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the result."""
        self._tried_rows, self._tried_width = cast(int, state["of"]), cast(int, state["width"])
        self._rows = self.config.rows or cast(int, state["rows"])

    def _search(self, engine: Engine, batch: Rows, rows: int) -> int:
        def attempt(count: int) -> None:
            _attempt(engine, first_rows(batch, count))

        with _room_for_the_optimizer(engine):
            device = torch.get_device_module(engine.device)
            if hasattr(device, "set_per_process_memory_fraction") and engine.device.type != "mps":
                with _limited(device, engine.device, self.config):
                    return fit.largest_tried(rows, attempt, partial(_empty_cache, device))
            if engine.device.type == "cpu" and fit.forget_peak():
                before, free = fit.peak_memory(), fit.free_memory()
                limit = free if self.config.limit is None else int(self.config.limit * GIB) - before

                def peak(count: int) -> int:
                    fit.forget_peak()
                    try:
                        attempt(count)
                    except torch.OutOfMemoryError:
                        return sys.maxsize
                    return fit.peak_memory() - before

                return fit.largest_measured(rows, peak, int(limit * (1 - self.config.margin)))
            warnings.warn(
                f"auto_accumulate: cannot measure memory on {engine.device} here, so the "
                f"whole batch of {rows} rows is tried; set auto_accumulate.rows yourself",
                RuntimeWarning,
                stacklevel=2,
            )
            return fit.largest_tried(rows, attempt, lambda: None)


def _empty_cache(module: ModuleType) -> None:
    """Free the memory of a failed attempt, including reference cycles."""
    gc.collect()
    module.empty_cache()


def _width(batch: Rows) -> int:
    """The number of values in a row."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() for tensor in tensors) // max(batch_size(batch)[0], 1)


def _attempt(engine: Engine, batch: Rows) -> None:
    """Run two micro-batches forward and backward, without side effects.

    Two, since the gradient and output of the first are still in memory during the second.
    """
    kept = []
    moved = to_device(batch, engine.device)
    with leaving_no_trace(engine):
        for _ in range(2):
            output = engine.hook.forward(engine=engine, batch=moved, step=None)
            terms = engine.hook.loss_terms(engine=engine, batch=moved, output=output, step=None)
            torch.autograd.backward(reduce(add, merge(terms).values()))
            kept.append((output, terms))
        kept.clear()


@contextmanager
def _room_for_the_optimizer(engine: Engine) -> Iterator[None]:
    """Reserve the memory of the optimizer's first step: two copies of each weight."""
    held: Sequence[Tensor] = ()
    if not engine.optimizer.state:
        held = [
            torch.zeros_like(p, requires_grad=False) for p in engine.parameters() for _ in range(2)
        ]
    try:
        yield
    finally:
        del held


@contextmanager
def _limited(
    module: ModuleType, device: torch.device, config: AutoAccumulateConfig
) -> Iterator[None]:
    """Make the allocator fail beyond the limit minus the margin.

    Args:
        module: the device module, such as `torch.cuda`.
        device: the device to limit.
        config: the plugin's settings, with limit and margin.
    """
    free, total = module.mem_get_info(device)
    limit = module.memory_reserved(device) + free
    if config.limit is not None:
        limit = config.limit * GIB
    before = module.get_per_process_memory_fraction(device)
    share = min(before, limit * (1 - config.margin) / total)
    module.set_per_process_memory_fraction(share, device)
    try:
        yield
    finally:
        module.set_per_process_memory_fraction(before, device)
