"""Weighing by magnitude: the numbers of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import Engine, Loss, LossConfig
from nexus_plugins.weigh_magnitude import WeighMagnitudePlugin
from tiny import Reads


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
    """Fails if mean, correction, weight or normalization is wrong, compared with the full mean."""
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
    """Fails if the setting `total` does nothing."""
    got = weights_after(WeighMagnitudePlugin(total="one"), {"one": [1.0], "two": [3.0]}, {})
    assert got == pytest.approx({"one": 0.75, "two": 0.25})


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-2, 1e2), st.floats(1e-2, 1e2)), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_a_loss_that_is_not_finite_is_left_out_of_mean_and_correction(
    losses: list[tuple[float, float]], bad: list[bool], value: float
) -> None:
    """Fails if a non-finite loss enters the mean, or counts as zero."""
    momentum = 0.9
    series = {
        "one": [a for a, _ in losses],
        "two": [value if spoilt else b for (_, b), spoilt in zip(losses, bad, strict=False)],
    }
    got = weights_after(WeighMagnitudePlugin(momentum=momentum), series, {"two": 3.0})
    means = {}
    for name, values in series.items():
        good = [v for v in values if math.isfinite(v)]
        shares = [momentum ** (len(good) - 1 - i) for i in range(len(good))]
        if good:
            total = sum(s * v for s, v in zip(shares, good, strict=True))
            means[name] = total / sum(shares)
    raw = {name: (3.0 if name == "two" else 1.0) / mean for name, mean in means.items()}
    expected = {name: len(raw) * value / sum(raw.values()) for name, value in raw.items()}
    assert got == pytest.approx({"two": 3.0} | expected, rel=1e-4)


def test_a_bad_first_loss_does_not_make_a_term_rule_the_total() -> None:
    """Fails if a term whose only loss was nan is treated as one with zero loss."""
    values = {"one": [1.0], "two": [float("nan")]}
    got = weights_after(WeighMagnitudePlugin(), values, {"one": 0.5, "two": 2.0})
    assert got == pytest.approx({"one": 1.0, "two": 2.0})


def test_a_resumed_run_has_the_same_weights() -> None:
    """Fails if a mean is restored without its bias correction."""
    plugin, again, whole = (WeighMagnitudePlugin() for _ in range(3))
    first = {"one": [1.0, float("nan"), 3.0], "two": [2.0, 5.0, 4.0]}
    weights_after(plugin, first, {})
    again.load_state_dict(plugin.state_dict())
    then = {"one": [2.0], "two": [1.0]}
    both = {name: [*first[name], first[name][-1], *then[name]] for name in first}
    assert weights_after(again, then, {}) == weights_after(whole, both, {})


def test_no_step_waits_for_the_device() -> None:
    """Fails if counting finite losses syncs."""
    model, reads = nn.Linear(1, 1), Reads()
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        plugins=[WeighMagnitudePlugin(), PlannedPlugin("one"), PlannedPlugin("two")],
        log_every=99,
    )
    batch = {"input": torch.ones(1, 1), "one": torch.ones(1), "two": torch.tensor([float("nan")])}
    with reads:
        for state in engine.steps([batch], until="99 steps"):
            if state.step == 4:
                break
    assert reads.count == 0
