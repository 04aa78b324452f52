"""PCGrad: the projections of the paper, on the gradient of the whole step."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import Engine, Loss, LossConfig
from nexus_plugins.pcgrad import PcgradPlugin


class Point(nn.Module):
    """Three shared parameters, one of them a scalar, and one used by the first term only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))
        self.left = nn.Parameter(torch.zeros(size - 1))
        self.right = nn.Parameter(torch.zeros(2, size))
        self.own = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        return torch.cat([self.number.view(1), self.left, self.right.flatten()])


class SlopePlugin(Loss[LossConfig]):
    """A term with a given gradient in the shared parameters: the mean of the batch's rows."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.name = self.term = f"term{index}"  # type: ignore[misc]
        self.index = index

    def units(self, batch: dict[str, Tensor]) -> float:
        return float(len(batch["slopes"]))

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return (batch["slopes"][:, self.index] @ output).sum()


class OwnPlugin(SlopePlugin):
    """A term with an additional parameter of its own."""

    model: Point

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return super().loss(batch, output) + 5 * len(batch["slopes"]) * self.model.own.sum()


def gradient_of(slopes: Tensor, split: int = 1, seed: int = 0) -> tuple[Tensor, float]:
    """The gradient of one step in the shared parameters, and in the first term's own."""
    model = Point(slopes.shape[-1] // 3).double()
    terms: list[Any] = [OwnPlugin(0), *(SlopePlugin(i) for i in range(1, slopes.shape[1]))]
    terms[0].model = model
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        plugins=[PcgradPlugin(), *terms],
        accumulate=split,
        seed=seed,
    )
    engine.fit([{"slopes": part} for part in slopes.tensor_split(split)], until="1 step")
    return -model().detach(), -float(model.own.detach())


def reference(gradients: Tensor) -> list[Tensor]:
    """Algorithm 1 on plain vectors, for every order of the projections."""
    found = []
    count = len(gradients)
    orders = [list(permutations([j for j in range(count) if j != i])) for i in range(count)]
    for choice in product(*orders):
        projected = []
        for own, order in zip(gradients, choice, strict=True):
            vector = own.clone()
            for other in order:
                dot = vector @ gradients[other]
                if dot < 0:
                    vector = vector - dot / gradients[other].square().sum() * gradients[other]
            projected.append(vector)
        found.append(torch.stack(projected).sum(0))
    return found


def slopes_of(seed: int, terms: int, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, terms, 6, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 3))
def test_the_gradient_is_that_of_the_papers_algorithm(seed: int, terms: int) -> None:
    """Fails if the algebra on inner products differs from projecting the vectors."""
    slopes = slopes_of(seed, terms)
    got, own = gradient_of(slopes, seed=seed)
    candidates = reference(slopes.mean(0))
    assert min(float((got - wanted).norm()) for wanted in candidates) < 1e-4
    assert own == pytest.approx(5.0)


def test_gradients_that_agree_are_added() -> None:
    """Fails if PCGrad changes gradients without conflicts."""
    slopes = slopes_of(0, 3).abs()
    got, _ = gradient_of(slopes)
    torch.testing.assert_close(got, slopes.mean(0).sum(0))


def test_opposite_gradients_leave_nothing() -> None:
    """Fails if the larger of two opposite gradients wins: a step that harms one term."""
    slopes = slopes_of(1, 2)
    slopes[:, 1] = -1000 * slopes[:, 0]
    got, _ = gradient_of(slopes)
    assert float(got.norm()) < 1e-3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4]))
def test_any_split_of_a_step_gives_the_same_gradient(seed: int, split: int) -> None:
    """Fails if conflicts are resolved per micro-batch instead of per step."""
    slopes = slopes_of(seed, 3)
    torch.testing.assert_close(
        gradient_of(slopes)[0], gradient_of(slopes, split)[0], atol=1e-6, rtol=1e-5
    )
