"""Utilization: FLOPs counted by hand, the logged speed, the peak of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nexus_core import Engine, Plugin, PluginError
from nexus_plugins import mfu
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.jsonl import JsonlPlugin
from nexus_plugins.mfu import MfuPlugin, matmul_rate
from nexus_plugins.throughput import ThroughputPlugin
from tests.distributed.processes import together
from tiny import RecorderPlugin

SPEED = "system/throughput_tokens_per_sec"


class Rows(nn.Module):
    """Two layers over embedded tokens, the first of them recomputed on request."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(10, 8)
        self.wide, self.narrow = nn.Linear(8, 32, bias=False), nn.Linear(32, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if self.recompute:
            return checkpoint(self._layers, hidden, use_reentrant=False)
        return self._layers(hidden)

    def _layers(self, hidden: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(hidden)))


def logs_of(
    *plugins: Plugin[Any], recompute: bool = False, **options: Any
) -> list[dict[str, float]]:
    model, keep = Rows(recompute), RecorderPlugin()
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, batch: m(batch["input_ids"]).square().mean(),
        plugins=[*plugins, keep],
        log_every=1,
        **options,
    )
    engine.fit([{"input_ids": torch.zeros(3, 5, dtype=torch.long)}] * 6, until="3 steps")
    return [metrics for _, metrics in keep.lines]


FLOPS_PER_TOKEN = 3 * 2 * (8 * 32 + 32 * 4)
"""Forward once, backward twice, a multiply-add is two: summed over both matrices."""


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_speed_times_operations_by_rate(recompute: bool, accumulate: int) -> None:
    """Fails if micro-batches or tokens are counted wrongly, or recomputation counts as work."""
    plugins = [ThroughputPlugin(), MfuPlugin(peak=1e6)]
    for line in logs_of(*plugins, recompute=recompute, accumulate=accumulate)[1:]:
        assert line["system/mfu"] == pytest.approx(line[SPEED] * FLOPS_PER_TOKEN / 1e6)


class FusedLoss(torch.autograd.Function):
    """The mean square of `hidden @ weight`, with gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, train: bool) -> Tensor:
        logits = hidden @ weight
        if train:
            slope = logits * (2 / logits.numel())
            ctx.save_for_backward(slope @ weight.T, hidden.T @ slope)
        return logits.square().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_is_left_out_beside_a_loss_that_makes_its_gradients_early(
    recompute: bool,
) -> None:
    """Fails if `recompute` appears to improve utilization."""
    head = nn.Parameter(torch.ones(4, 7))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = model(batch["input_ids"]).flatten(0, 1)
        return FusedLoss.apply(hidden, head, torch.is_grad_enabled())  # type: ignore[no-any-return]

    model, keep = Rows(recompute), RecorderPlugin()
    model.register_parameter("head", head)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=loss,
        plugins=[ThroughputPlugin(), MfuPlugin(peak=1e6), keep],
        log_every=1,
    )
    engine.fit([{"input_ids": torch.zeros(3, 5, dtype=torch.long)}] * 3, until="3 steps")
    expected = FLOPS_PER_TOKEN + 3 * 2 * 4 * 7
    for _, line in keep.lines[1:]:
        assert line["system/mfu"] == pytest.approx(line[SPEED] * expected / 1e6)


def shared_logs() -> list[dict[str, float]]:
    ddp = DdpPlugin()
    ddp.join()
    return logs_of(ddp, ThroughputPlugin(), MfuPlugin(peak=1e6))


@pytest.mark.slow
def test_two_processes_use_two_devices() -> None:
    """Fails if the work of all processes is divided by the peak of one device."""
    for line in together(2, shared_logs)[0][1:]:
        assert line["system/mfu"] == pytest.approx(line[SPEED] / 2 * FLOPS_PER_TOKEN / 1e6)


def test_given_operations_are_not_counted() -> None:
    """Fails if a given number is overridden."""
    for line in logs_of(ThroughputPlugin(), MfuPlugin(peak=1e6, flops_per_token=5.0)):
        assert line["system/mfu"] == pytest.approx(line[SPEED] * 5 / 1e6)


@pytest.mark.parametrize(("amp", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_rate_is_that_of_the_type_the_model_computes_in(
    amp: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a bf16 run is compared with the float32 peak, or the peak is measured twice."""
    asked: list[torch.dtype] = []

    def rate(device: torch.device, dtype: torch.dtype) -> float:
        asked.append(dtype)
        return 1e6

    monkeypatch.setattr(mfu, "matmul_rate", rate)
    lines = logs_of(*[AmpPlugin()] * amp, ThroughputPlugin(), MfuPlugin())
    assert asked == [expected]
    assert ["system/mfu" in line for line in lines] == [False, True, True]


def test_the_rate_of_this_machine_is_plausible() -> None:
    """Fails if the unit is off by a thousand, or the wrong time is measured."""
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e13


def test_it_needs_the_speed() -> None:
    """Fails if a run without `throughput` silently has no utilization."""
    with pytest.raises(PluginError, match="'mfu' requires 'throughput'"):
        logs_of(MfuPlugin())


def test_a_run_on_this_machine_is_between_nothing_and_all(tmp_path: Path) -> None:
    """Fails if counted FLOPs and measured peak are inconsistent."""
    lines = logs_of(ThroughputPlugin(), MfuPlugin(), JsonlPlugin(), out=tmp_path)
    stored = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < stored["system/mfu"] == lines[-1]["system/mfu"] < 1
