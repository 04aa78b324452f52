"""Gradient clipping: the same numbers as torch, and the logged norm before clipping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core import ConfigError, Engine
from nexus_core.processes import Ranks
from nexus_plugins._shared import norms
from nexus_plugins.clip import ClipPlugin


def engine_of(
    model: nn.Module, plugin: ClipPlugin, scale: float = 1.0, cells: int | None = None
) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Engine(
        model,
        optimizer,
        loss=lambda model, batch: scale * model(batch).square().mean(),
        plugins=[plugin],
        log_every=1,
        cells=cells,
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-4, 1e4),
    max_norm=st.floats(1e-3, 1e3),
    mixed=st.booleans(),
    cells=st.sampled_from([None, 1]),
)
def test_update_is_that_of_torchs_clipping(
    seed: int, scale: float, max_norm: float, mixed: bool, cells: int | None
) -> None:
    """Fails if any path (one dtype, mixed dtypes, in cells) differs from torch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    if mixed:
        model[2].double()
        model[1] = nn.Sequential(nn.Tanh(), _ToDouble())
    batch = torch.randn(3, 5)
    start = [p.detach().clone() for p in model.parameters()]

    (scale * model(batch).square().mean()).backward()
    length = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    expected = [p - p.grad for p in model.parameters()]

    engine = engine_of(model, ClipPlugin(max_norm=max_norm), scale, cells)
    result = engine.fit([batch], until="1 step")

    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted.detach(), rtol=1e-5, atol=1e-7)
    assert result.metrics["train/grad_norm"] == pytest.approx(float(length), rel=1e-5)
    assert start[0].shape == expected[0].shape


class _ToDouble(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def test_a_step_is_never_longer_than_max_norm() -> None:
    """Fails if clipping runs before the gradient is complete (accumulation) or not at all."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = Engine(
        model,
        optimizer,
        loss=lambda model, batch: 1e3 * model(batch).sum(),
        plugins=[ClipPlugin(max_norm=0.5)],
        accumulate=3,
    )
    engine.fit([torch.randn(2, 4) for _ in range(3)], until="1 step")
    moved = torch.cat(
        [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    )
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)


def test_infinite_max_norm_only_logs() -> None:
    """Fails if logging the norm changes training."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    batch = torch.randn(2, 4)
    (100 * model(batch).square().mean()).backward()
    expected = [(p - p.grad).detach().clone() for p in model.parameters()]
    result = engine_of(model, ClipPlugin(max_norm=float("inf")), 100.0).fit([batch], until=1)
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.detach(), wanted)
    assert result.metrics["train/grad_norm"] > 0


def test_frozen_and_unused_parameters_do_not_count() -> None:
    """Fails if a parameter without a gradient stops the run or enters the norm."""
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    model["used"].bias.requires_grad_(False)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        loss=lambda model, batch: model["used"](batch).sum(),
        plugins=[ClipPlugin(max_norm=1e9)],
        log_every=1,
    )
    result = engine.fit([torch.tensor([[3.0, 4.0]])], until=1)
    assert result.metrics["train/grad_norm"] == pytest.approx(5.0)


@pytest.mark.parametrize("value", [0, -1, "much"])
def test_refuses_a_norm_that_is_no_length(value: object) -> None:
    """Fails if an invalid setting is accepted."""
    with pytest.raises(ConfigError, match=r"clip\.max_norm"):
        ClipPlugin(max_norm=value)


def stepped(plugin: ClipPlugin | None, model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """The change of the weights in one step of size one: the applied gradient."""
    before = [p.detach().clone() for p in model.parameters()]
    engine = engine_of(model, plugin or ClipPlugin(max_norm=float("inf")), scale=10.0)
    norm = engine.fit([batch], until=1).metrics["train/grad_norm"]
    assert norm > 1, "the length is that before clipping"
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))


def test_by_value_each_number_is_limited() -> None:
    batch = torch.randn(4, 2, 3)
    whole = stepped(None, small(), batch)
    found = stepped(ClipPlugin(by="value", max_value=0.05), small(), batch)
    for one, other in zip(whole, found, strict=True):
        torch.testing.assert_close(one.clamp(-0.05, 0.05), other, rtol=1e-4, atol=1e-6)


def test_adaptive_clipping_limits_each_unit_against_its_weights() -> None:
    """The paper's equation, unit by unit, on every parameter except excluded ones."""
    batch = torch.randn(4, 2, 3)
    whole = stepped(None, small(), batch)
    plugin = ClipPlugin(by="agc", ratio=0.1, eps=0.01, spare=("3.*",))
    found = stepped(plugin, small(), batch)
    clipped = 0
    for (name, weight), gradient, other in zip(
        small().named_parameters(), whole, found, strict=True
    ):
        units = range(len(weight)) if weight.ndim > 1 else [slice(None)]
        for unit in units:
            limit = 0.1 * max(float(weight[unit].detach().norm()), 0.01)
            length = float(gradient[unit].norm())
            expected = gradient[unit] * min(1.0, limit / length)
            if name.startswith("3."):
                expected = gradient[unit]
            clipped += not name.startswith("3.") and length > limit
            torch.testing.assert_close(other[unit], expected, rtol=1e-4, atol=1e-6)
    assert clipped, "something was too long"


def test_two_instances_log_their_own_length() -> None:
    model, late = small(), ClipPlugin.labelled("late")(max_norm=9.0)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=1.0),
                    loss=lambda m, b: 10 * m(b).square().mean(),
                    plugins=[ClipPlugin(max_norm=0.5), late])  # fmt: skip
    metrics = engine.fit([torch.randn(4, 2, 3)], until=1).metrics
    assert metrics["train/grad_norm"] > metrics["train/grad_norm_late"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_value": 0.5}, "max_value has no effect with by=norm; remove it, or set by to value"),
        ({"by": "agc", "max_norm": 0.5}, "max_norm has no effect with by=agc"),
    ],
)
def test_a_limit_that_would_not_act_is_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ClipPlugin(**settings)
    stored = ClipPlugin(by="agc", ratio=0.1).config.model_dump(mode="json")
    assert ClipPlugin(**stored).config.model_dump(mode="json") == stored, "what is stored is read"


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6),
    at_once=st.integers(1, 40),
)
def test_length_in_cells_does_not_depend_on_what_is_added_at_once(
    shapes: list[tuple[int, ...]], at_once: int
) -> None:
    """Fails if rows at block boundaries are lost, counted twice or mixed up."""
    generator = torch.Generator().manual_seed(at_once)
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(norms.AT_ONCE, "cpu", at_once)
        found = norms.steady_norm(gradients, Ranks())
    assert torch.equal(found, norms.steady_norm(gradients, Ranks()))
    assert float(found) == pytest.approx(
        math.sqrt(math.fsum(float(x) ** 2 for g in gradients for x in g.flatten())), rel=1e-6
    )
