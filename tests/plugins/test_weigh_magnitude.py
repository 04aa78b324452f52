"""Weighing by magnitude: the numbers of its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import Engine, Loss, LossConfig
from nexus_plugins.weigh_magnitude import WeighMagnitudePlugin


class PlannedPlugin(Loss[LossConfig]):
    """A term whose value is in the batch."""

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.name = self.term = name  # type: ignore[misc]

    def units(self, batch: dict[str, Tensor]) -> float:
        return 1.0

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return batch[self.term].sum() + 0 * output.sum()


def weights_after(
    plugin: WeighMagnitudePlugin, values: dict[str, list[float]], own: dict[str, float]
) -> dict[str, float]:
    model = nn.Linear(1, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        plugins=[plugin, *(PlannedPlugin(name, own.get(name, 1.0)) for name in values)],
        log_every=1,
    )
    steps = len(next(iter(values.values())))
    batches = [
        {"input": torch.ones(1, 1)} | {name: torch.tensor([v[i]]) for name, v in values.items()}
        for i in range(steps)
    ]
    result = engine.fit([*batches, batches[-1]], until=steps + 1)
    return {name: result.metrics[f"weight/{name}"] for name in values}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=6),
    st.floats(0, 0.99),
    st.floats(0.1, 10),
)
def test_weights_are_inverse_to_the_bias_corrected_mean(
    losses: list[tuple[float, float]], momentum: float, own: float
) -> None:
    """Breaks if mean, correction, own weight or normalisation is wrong: the mean in full."""
    plugin = WeighMagnitudePlugin(momentum=momentum)
    values = {"one": [a for a, _ in losses], "two": [-b for _, b in losses]}
    got = weights_after(plugin, values, {"one": own})
    shares = [momentum ** (len(losses) - 1 - i) for i in range(len(losses))]
    means = {
        name: sum(s * abs(v) for s, v in zip(shares, series, strict=True)) / sum(shares)
        for name, series in values.items()
    }
    raw = {"one": own / means["one"], "two": 1 / means["two"]}
    expected = {name: 2 * value / sum(raw.values()) for name, value in raw.items()}
    assert got == pytest.approx(expected, rel=1e-4)


def test_weights_can_sum_to_one() -> None:
    """Breaks if the setting `total` does nothing."""
    got = weights_after(WeighMagnitudePlugin(total="one"), {"one": [1.0], "two": [3.0]}, {})
    assert got == pytest.approx({"one": 0.75, "two": 0.25})


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    """Breaks if one overflow makes every later weight NaN."""
    values = {"one": [1.0, float("nan"), 1.0], "two": [1.0, float("inf"), 1.0]}
    got = weights_after(WeighMagnitudePlugin(), values, {})
    assert got == pytest.approx({"one": 1.0, "two": 1.0})
