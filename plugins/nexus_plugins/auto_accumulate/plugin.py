"""Trains on batches that are larger than memory allows at once."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import DataError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.data import Batch, batch_size
from nexus_core.meter import Meter
from nexus_core.state import random_state, set_random_state
from nexus_core.step import backward, merge, step_units
from nexus_plugins.auto_accumulate import fit
from nexus_plugins.auto_accumulate.split import Rows, first_rows, is_splittable, parts

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["AutoAccumulateConfig", "AutoAccumulatePlugin"]

GIB = 2**30
Counts = Mapping[str, Tensor | float]


class AutoAccumulateConfig(PluginConfig):
    """Settings of the search for the largest micro-batch."""

    rows: int | None = Field(
        None, ge=1, description="rows of a micro-batch at the most; null: as many as fit"
    )
    limit: float | None = Field(
        None, gt=0, description="memory for the search, in GiB; null: what the device has free"
    )
    margin: float = Field(0.1, ge=0, lt=1, description="share of this memory to leave alone")


class AutoAccumulatePlugin(Plugin[AutoAccumulateConfig]):
    """Splits each batch into the largest micro-batches that fit into memory.

    The rows of a step stay as configured, and so does the update, up to the rounding of sums (and
    up to dropout, which is drawn by micro-batch). The search is made at the first step, and again
    when rows get longer: on CUDA by trying, from the whole batch down; on Linux without CUDA by
    measuring, from one row up; elsewhere the whole batch is tried. It leaves weights, gradients,
    buffers and random generators as they were. What was found is saved with the run, and holds
    when it is resumed. `system/micro_batch_rows` is logged.

    Batches must be dicts of tensors. Every part of a batch stands in its place for the hooks
    `forward`, `loss_terms` and `backward`; the others see the whole.
    """

    after: ClassVar[tuple[str, ...]] = ("curriculum",)

    def __init__(self, config: AutoAccumulateConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self._rows = self.config.rows or 0
        self._tried_rows = self._tried_width = 0
        self._counts: list[Counts] = []
        self._units: Counts = {}
        self._weights: Counts = {}
        self._rest: list[dict[str, object]] = []
        self._whole: tuple[Rows, dict[str, object], bool] | None = None
        self._counting = False

    @hookimpl
    def on_start(self) -> None:
        """Forget what an interrupted step has left."""
        self._counts, self._rest, self._counting = [], [], False

    @hookimpl(trylast=True)
    def on_batch(self, engine: Engine, batch: Batch) -> None:
        """Search, if such a batch has not been searched for yet.

        Raises:
            DataError: the batch is no dict.
            RunError: one row does not fit.
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

    @hookimpl(wrapper=True)
    def loss_units(
        self, engine: Engine, batch: Batch
    ) -> Generator[None, list[Counts], list[Counts]]:
        """Count the units of the parts, and those of the step."""
        answers = yield
        if not engine.training or self._counting:
            return answers
        if self._splits(engine, batch):
            self._counting = True
            counts = [
                merge(engine.hook.loss_units(engine=engine, batch=part))
                for part in parts(batch, self._rows)
            ]
            self._counting = False
            answers = [{name: reduce(add, [c[name] for c in counts]) for name in counts[0]}]
        self._counts.append(merge(answers))
        return answers

    @hookimpl(wrapper=True)
    def weigh_losses(self, engine: Engine) -> Generator[None, Counts, Counts]:
        """Remember weights and units of the step for its parts."""
        self._units, self._counts = step_units(self._counts, engine.ranks), []
        self._weights = yield
        return self._weights

    @hookimpl(wrapper=True, tryfirst=True)
    def forward(self, engine: Engine, batch: Batch) -> Generator[None, Any, Any]:
        """Put the first part in the batch's place."""
        if engine.training and self._splits(engine, batch):
            first, *self._rest = parts(batch, self._rows)
            self._whole = (batch, dict(batch), engine.last_micro_batch)
            batch.update(first)
            engine.last_micro_batch = False
        return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def backward(self, engine: Engine) -> Generator[None, bool, bool]:
        """Do the other parts, and put the batch back."""
        done = yield
        rest, self._rest = self._rest, []
        if rest and self._whole is not None:
            (batch, whole, is_last), self._whole = self._whole, None
            counted = dict.fromkeys(self._units, 0.0)  # with the first part
            for place, part in enumerate(rest, start=1):
                engine.last_micro_batch = is_last and place == len(rest)
                backward(engine, part, counted, self._units, self._weights)
            engine.last_micro_batch = False  # the step's end has been recorded with its last part
            batch.update(whole)
        return done

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The rows of a micro-batch."""
        return {"system/micro_batch_rows": float(self._rows)} if self._rows else {}

    def state_dict(self) -> StateDict:
        """What was found, and for which batches."""
        found = {"rows": self._rows, "of": self._tried_rows, "width": self._tried_width}
        return cast(StateDict, found) if self._tried_rows else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Keep to what was found."""
        self._tried_rows, self._tried_width = cast(int, state["of"]), cast(int, state["width"])
        self._rows = self.config.rows or cast(int, state["rows"])

    def _splits(self, engine: Engine, batch: Batch) -> bool:
        return 0 < self._rows < batch_size(batch)[0] and is_splittable(batch)

    def _search(self, engine: Engine, batch: Rows, rows: int) -> int:
        self._rows = 0  # an attempt is not split itself

        def attempt(count: int) -> None:
            _attempt(engine, first_rows(batch, count))

        with _room_for_the_optimizer(engine):
            if engine.device.type == "cuda":
                with _cuda_limit(engine.device, self.config):
                    return fit.largest_tried(rows, attempt, _empty_cache)
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
                f"auto_accumulate: memory cannot be measured on {engine.device} here, so the "
                f"whole batch of {rows} rows is tried; set auto_accumulate.rows yourself",
                RuntimeWarning,
                stacklevel=2,
            )
            return fit.largest_tried(rows, attempt, lambda: None)


def _empty_cache() -> None:
    """Give the memory of a failed attempt back, reference cycles included."""
    gc.collect()
    torch.cuda.empty_cache()


def _width(batch: Rows) -> int:
    """Numbers in a row."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() for tensor in tensors) // max(batch_size(batch)[0], 1)


def _attempt(engine: Engine, batch: Rows) -> None:
    """Run two micro-batches forward and backward, and leave no trace.

    Two, since the second meets what is kept of the first: its gradient and its output.
    """
    generators, meter = random_state(), engine.meter
    buffers = [(buffer, buffer.clone()) for buffer in engine.model.buffers()]
    engine.meter = Meter()
    kept = []
    try:
        for _ in range(2):
            output = engine.hook.forward(engine=engine, batch=batch)
            terms = merge(engine.hook.loss_terms(engine=engine, batch=batch, output=output))
            reduce(add, terms.values()).backward()
            kept.append((output, terms))
    finally:
        kept.clear()
        engine.meter = meter
        for parameter in engine.model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        set_random_state(generators)


@contextmanager
def _room_for_the_optimizer(engine: Engine) -> Iterator[None]:
    """Hold as much memory as the optimizer will ask for in its first step: two of each weight."""
    held: Sequence[Tensor] = ()
    if not engine.optimizer.state:
        trained = [p for group in engine.optimizer.param_groups for p in group["params"]]
        held = [torch.zeros_like(p, requires_grad=False) for p in trained for _ in range(2)]
    try:
        yield
    finally:
        del held


@contextmanager
def _cuda_limit(device: torch.device, config: AutoAccumulateConfig) -> Iterator[None]:
    """Let the allocator refuse what is above the limit less the margin."""
    free, total = torch.cuda.mem_get_info(device)
    has = torch.cuda.memory_reserved(device)
    limit = has + free if config.limit is None else config.limit * GIB
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = min(before, limit * (1 - config.margin) / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
