"""Measures the share of the machine's peak FLOP/s that training uses."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from nexus_core import Batch, Plugin, PluginConfig, hookimpl
from nexus_core.batches import batch_size, to_device
from nexus_core.step import merge
from nexus_core.update import leaving_no_trace

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["MfuConfig", "MfuPlugin", "count_flops", "matmul_rate"]

SPEED = "system/throughput_tokens_per_sec"
SIDES = {"cuda": 8192}  # matrix sizes that fill the device; 1024 elsewhere
SECONDS_SPENT = 0.5  # on the measurement, after one matmul as warm-up
Answers = list[Mapping[str, Any]]


class MfuConfig(PluginConfig):
    """Settings of the utilization."""

    flops_per_token: float | None = Field(
        default=None, gt=0, description="FLOPs per token, forward and backward; null: counted"
    )
    peak: float | None = Field(
        default=None, gt=0, description="peak FLOP/s that count as 1; null: measured"
    )


class MfuPlugin(Plugin[MfuConfig]):
    """Logs `system/mfu`, model FLOPs utilization; does not affect training.

    Tokens per second, times FLOPs per token, divided by the peak FLOP/s of the devices, one per
    process. FLOPs are those of matmuls, convolutions and attention, forward and backward, a
    multiply-add counting as two; they are counted once, on the last micro-batch of the session's
    first step. Anything beyond three forward passes is recomputation and is not counted. The peak
    is measured: the fastest large matmul in the dtype that the model computes in.

    Source: Chowdhery et al. 2022, "PaLM", appendix B; here operations are counted instead of
    computed by formula, and the peak is measured instead of taken from the vendor.
    """

    config_class = MfuConfig
    api_version: ClassVar[str] = "1.2"
    requires: ClassVar[tuple[str, ...]] = ("throughput",)

    _batch: Batch = None
    _dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._flops_per_token = self.config.flops_per_token
        self._peak = self.config.peak

    @hookimpl
    def on_step(self, step: Step) -> None:
        """Keep a micro-batch until its FLOPs are counted."""
        if self._flops_per_token is None:
            self._batch = step.micro[-1].batch

    @hookimpl(wrapper=True)
    def forward(self, engine: Engine) -> Generator[None, Any, Any]:
        """Record the dtype that the model computes in."""
        self._dtype = self._dtype or _compute_dtype(engine)
        return (yield)

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        """After the first step, count FLOPs and measure the peak, outside the timed part."""
        if self._flops_per_token is None:
            tokens = max(1, batch_size(self._batch)[1])
            self._flops_per_token = count_flops(engine, self._batch) / tokens
            self._batch = None
        self._peak = self._peak or matmul_rate(engine.device, self._dtype or torch.float32)

    @hookimpl(wrapper=True)
    def collect_metrics(self, engine: Engine) -> Generator[None, Answers, Answers]:
        """Report the utilization, once the peak is known."""
        answers = yield
        speeds = [answer[SPEED] for answer in answers if SPEED in answer]
        if self._peak is None or self._flops_per_token is None or not speeds:
            return answers
        speed = speeds[0] / engine.ranks.size
        return [*answers, {"system/mfu": speed * self._flops_per_token / self._peak}]


def count_flops(engine: Engine, batch: Batch) -> int:
    """The FLOPs of a training pass over a batch, counted in an extra pass without side effects."""
    # counting within a step would change its rounding, as PyTorch then decomposes products
    # differently
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    batch = to_device(batch, engine.device)
    with leaving_no_trace(engine):
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            _total_loss(engine, batch)
        with FlopCounterMode(display=False) as training:
            torch.autograd.grad(_total_loss(engine, batch), parameters, allow_unused=True)
    return min(int(training.get_total_flops()), 3 * int(forward.get_total_flops()))


def _total_loss(engine: Engine, batch: Batch) -> torch.Tensor:
    output = engine.hook.forward(engine=engine, batch=batch, step=None)
    terms = engine.hook.loss_terms(engine=engine, batch=batch, output=output, step=None)
    return torch.stack([*merge(terms).values()]).sum()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest matmul of two large square matrices, in FLOP/s; syncs with the device."""
    side = SIDES.get(device.type, 1024)
    one = torch.ones(side, side, device=device, dtype=dtype)
    _seconds_of_product(one)
    start, best = time.perf_counter(), _seconds_of_product(one)
    while time.perf_counter() - start < SECONDS_SPENT:
        best = min(best, _seconds_of_product(one))
    return 2 * side**3 / best


def _seconds_of_product(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()  # syncs with any kind of device
    return time.perf_counter() - start


def _compute_dtype(engine: Engine) -> torch.dtype:
    if torch.is_autocast_enabled(engine.device.type):
        return torch.get_autocast_dtype(engine.device.type)
    return next((p.dtype for p in engine.model.parameters()), torch.float32)
