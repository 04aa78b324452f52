"""The meter: wrong means would falsify every logged number."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus_core.meter import Meter
from nexus_core.processes import Ranks

values = st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 50)), min_size=1)


@given(values, st.integers(0, 5))
def test_mean_is_weighted_by_units_and_survives_a_save(
    pairs: list[tuple[float, int]], saved_at: int
) -> None:
    meter = Meter()
    for place, (value, units) in enumerate(pairs):
        meter.add("loss", torch.tensor(value), torch.tensor(units))
        if place == saved_at:
            state, meter = meter.state_dict(), Meter()
            meter.load_state_dict(state)
    sums = np.array(pairs, dtype=np.float64).sum(axis=0)
    assert meter.read(Ranks())["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-6, abs=1e-6)
    assert meter.read(Ranks()) == {}


def test_numbers_and_tensors_mix_and_a_mean_is_finished_once() -> None:
    meter = Meter()
    meter.add("perplexity", torch.tensor([2.0]), 2, math.exp)
    meter.add("perplexity", 4.0, torch.tensor(1.0), math.exp)
    meter.add("unweighted", 3.0)
    assert meter.read(Ranks()) == {"perplexity": pytest.approx(math.exp(2)), "unweighted": 3.0}


def test_metric_without_units_is_left_out_and_overflow_is_infinite() -> None:
    meter = Meter()
    meter.add("nothing", 0.0, 0.0)
    meter.add("huge", 1e6, 1.0, math.exp)
    assert meter.read(Ranks()) == {"huge": math.inf}


class Seven:
    """A metric with a state of its own."""

    def compute(self) -> float:
        return 7.0

    def reset(self) -> None: ...


def test_what_is_rolled_back_is_given_back() -> None:
    meter, seven = Meter(), Seven()
    meter.add("loss", 2.0)
    mark = meter.mark()
    meter.add("loss", 4.0)
    meter.add("perplexity", 3.0, 2.0, math.exp)
    meter.add("seven", seven)
    forgotten = meter.rollback(mark)
    rest = [("perplexity", 3.0, 2.0, math.exp), ("seven", seven, 1.0, None)]
    assert forgotten == [("loss", 4.0, 1.0, None), *rest]
    for added in rest:
        meter.add(*added)
    means = {"loss": 2.0, "perplexity": pytest.approx(math.exp(1.5)), "seven": 7.0}
    assert meter.read(Ranks()) == means
