"""Distillation: the divergence from a teacher, summed over labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from called import text
from nexus_core import ConfigError, Engine, ResumableLoader
from nexus_core.testing import tiny_model
from nexus_plugins.loss_distill import LossDistillPlugin, divergence
from nexus_plugins.model_nexus import ModelNexusPlugin, NEXUSCore


def teacher() -> nn.Module:
    """A larger NEXUS with the same vocabulary."""
    torch.manual_seed(5)
    return NEXUSCore(vocab_size=13, d_model=32, ssm_n_layers=1, ssm_head_dim=16)


def other_kind() -> nn.Module:
    torch.manual_seed(5)
    return tiny_model(vocabulary=13)


def larger() -> nn.Module:
    return tiny_model(vocabulary=17)


def no_model() -> int:
    return 3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("fused", [True, False])
def test_it_is_the_divergence_by_scipy(temperature: float, fused: bool) -> None:
    """Fails if the direction, the temperature or ignored positions are wrong."""
    hidden, head = torch.randn(2, 5, 4), torch.randn(7, 4)
    theirs, their_head = torch.randn(2, 5, 3), torch.randn(7, 3)
    counted = torch.rand(2, 5) < 0.6
    own, taught = hidden @ head.T, theirs @ their_head.T
    student: Any = SimpleNamespace(hidden=hidden, head_weight=head) if fused else own
    found = divergence(student, taught, counted, temperature)
    p = log_softmax(taught.double().numpy() / temperature, axis=-1)
    q = log_softmax(own.double().numpy() / temperature, axis=-1)
    total = (np.exp(p) * (p - q)).sum(-1)[counted.numpy()].sum() * temperature**2
    assert found.item() == pytest.approx(total, rel=1e-4)


def test_gradients_reach_the_model_alone() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    head, taught = torch.randn(7, 4, requires_grad=True), torch.randn(1, 3, 7, requires_grad=True)
    student = SimpleNamespace(hidden=hidden, head_weight=head)
    divergence(student, taught, torch.ones(1, 3, dtype=torch.bool), 1.0).backward()
    assert taught.grad is None
    assert min(hidden.grad.abs().max(), head.grad.abs().max()) > 0


def engine_of(function: Any) -> Engine:
    sizes = {"vocab_size": 13, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16}
    torch.manual_seed(1)
    model = NEXUSCore(**sizes)
    plugins = [ModelNexusPlugin(**sizes), LossDistillPlugin(teacher=function)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return Engine(model, optimizer, plugins=plugins, log_every=1, seed=1)


@pytest.mark.parametrize("function", [teacher, other_kind])
def test_a_model_comes_nearer_to_its_teacher(function: Any) -> None:
    """Fails if the teacher is trained, in training mode, or not the target."""
    engine = engine_of(function)
    train, _ = text()
    first, *_, last = (
        engine.metrics["train/total_loss"]
        for _ in engine.steps(ResumableLoader(train, 4), until="20 steps")
    )
    assert last < 0.9 * first
    made = engine.plugins["loss_distill"]._teacher
    assert all(map(torch.equal, made.parameters(), function().parameters()))


@pytest.mark.parametrize(
    ("function", "said"),
    [(larger, "the teacher has 17 ids, the model 13"), (no_model, "returned a int")],
)
def test_a_teacher_that_does_not_fit_is_refused(function: Any, said: str) -> None:
    train, _ = text()
    with pytest.raises(ConfigError, match=said):
        engine_of(function).fit(ResumableLoader(train, 4), until=1)


def test_packed_rows_and_a_teacher_that_would_mix_documents_are_refused() -> None:
    ids = torch.randint(13, (1, 6))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    batch: dict[str, Tensor] = {"input_ids": ids, "labels": labels, "segment_ids": ids * 0}
    with pytest.raises(ConfigError, match="takes no segment_ids"):
        engine_of(other_kind).fit([batch], until=1)
