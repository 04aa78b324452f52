"""The language-model loss compared with numpy, and its memory use."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from nexus_core.errors import ConfigError, DataError
from nexus_plugins._shared import linear_cross_entropy as home
from nexus_plugins._shared.linear_cross_entropy import linear_cross_entropy
from nexus_plugins.loss_lm import LossLmPlugin

few = settings(max_examples=20)


def smoothed(logits: NDArray[Any], labels: NDArray[Any], smoothing: float) -> float:
    """Sum over the rows of -q · log p, with q the label mixed with the uniform distribution."""
    total = 0.0
    for row, label in zip(log_softmax(logits, axis=-1), labels, strict=True):
        if label != -100:
            target = np.full(len(row), smoothing / len(row))
            target[label] += 1 - smoothing
            total -= float(target @ row)
    return total


def inputs(seed: int, rows: int, vocab: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(rows, 5, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, 5, generator=generator, dtype=dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    return [hidden.requires_grad_(), weight.requires_grad_(), labels]


@few
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 7),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    at_once=st.integers(1, 80),
    in_cache=st.integers(1, 80),
    seed=st.integers(0, 999),
    never_waits=st.booleans(),
)
def test_fused_loss_and_gradients_are_those_of_full_logits(
    rows: int,
    vocab: int,
    smoothing: float,
    at_once: int,
    in_cache: int,
    seed: int,
    never_waits: bool,
) -> None:
    """Fails if the memory-saving loss differs from cross-entropy.

    On an accelerator, ignored rows are zeroed instead of dropped.
    """
    hidden, weight, labels = inputs(seed, rows, vocab)
    logits = hidden @ weight.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "LOGITS_AT_ONCE", at_once)
        patch.setattr(home, "LOGITS_IN_CACHE", in_cache)
        if never_waits:
            patch.setattr(home, "_dropped", home._emptied)
        total = linear_cross_entropy(hidden, weight, labels, smoothing)
    expected = smoothed(logits.detach().numpy(), labels.numpy(), smoothing)
    assert total.item() == pytest.approx(expected, abs=1e-9)
    full = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    actual = torch.autograd.grad(3 * total, (hidden, weight))
    wanted = torch.autograd.grad(3 * full, (hidden, weight))
    for gradient, reference in zip(actual, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def test_gradient_matches_finite_differences() -> None:
    """Fails if the handwritten backward pass is wrong."""
    hidden, weight, labels = inputs(0, 4, 6)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, 0.1), (hidden, weight)
    )


def test_loss_is_exact_where_the_label_is_all_but_impossible() -> None:
    """Fails if a confident mistake has infinite loss."""
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    assert total.item() == 2000.0
    assert torch.autograd.grad(total, hidden)[0].item() == 2.0


def test_backward_twice_gives_the_same_gradient() -> None:
    """Fails if computing gradients twice (for a norm per term) changes them."""
    hidden, weight, labels = inputs(0, 4, 6)
    total = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight))
    assert all(map(torch.equal, first, second))


def test_no_graph_is_made_where_none_is_wanted() -> None:
    """Fails if evaluation pays for gradients, or a frozen head breaks training."""
    hidden, weight, labels = inputs(0, 4, 6)
    reference = linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, labels)
    assert total.item() == reference.item()
    assert not total.requires_grad
    frozen = linear_cross_entropy(hidden, weight.detach(), labels)
    torch.testing.assert_close(
        torch.autograd.grad(frozen, hidden), torch.autograd.grad(reference, hidden)
    )


def test_nothing_counted_is_a_loss_of_zero() -> None:
    """Fails if a batch of only padding results in nan."""
    hidden, weight, labels = inputs(0, 4, 6)
    total = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert total.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_bfloat16_autocast_stays_near_float32() -> None:
    """Fails if mixed precision changes the loss or the dtype of gradients."""
    hidden, weight, labels = inputs(0, 200, 300, torch.float32)
    exact = linear_cross_entropy(hidden, weight, labels, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, labels, 0.1)
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3)
    for near, far in zip(
        torch.autograd.grad(rounded, (hidden, weight)),
        torch.autograd.grad(exact, (hidden, weight)),
        strict=True,
    ):
        assert near.dtype == torch.float32
        assert (near - far).norm() < 0.02 * far.norm()


def test_float16_sums_over_many_rows_stay_in_range() -> None:
    """Fails if a frequent token overflows float16 before a loss scale could help."""
    hidden = torch.full((40_000, 2), 8.0, requires_grad=True)
    weight = torch.zeros(4, 2, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        total = linear_cross_entropy(hidden, weight, torch.zeros(40_000, dtype=torch.long))
    (gradient,) = torch.autograd.grad(total, weight)
    expected = 8.0 * 40_000 * torch.tensor([-0.75, 0.25, 0.25, 0.25])
    torch.testing.assert_close(gradient, expected.unsqueeze(1).expand(4, 2), rtol=1e-3, atol=0)


def outputs() -> dict[str, Any]:
    hidden, weight = torch.randn(2, 3, 5), torch.randn(7, 5)
    logits = hidden @ weight.T
    return {
        "hidden": SimpleNamespace(hidden=hidden, head_weight=weight),
        "logits": SimpleNamespace(logits=logits),
        "tensor": logits,
        "tuple": (logits, {"module_outputs": {}}),
        "dict": {"logits": logits, "loss": None},
        "dict of hidden": {"hidden": hidden, "head_weight": weight},
        "list": [SimpleNamespace(logits=logits), None],
    }


@pytest.mark.parametrize("kind", outputs())
def test_every_kind_of_output_has_the_same_loss(kind: str) -> None:
    """Fails if a model that only offers logits cannot be trained, or trains differently."""
    torch.manual_seed(0)
    output = outputs()
    labels = torch.tensor([[1, -100, 3], [4, 5, 6]])
    plugin = LossLmPlugin()
    logits = output["tensor"].flatten(0, 1).double().numpy()
    batch = {"labels": labels}
    assert plugin.units(batch) == 5
    expected = smoothed(logits, labels.flatten().numpy(), 0.1)
    assert plugin.loss(batch, output[kind]).item() == pytest.approx(expected, rel=1e-5)
    plain = smoothed(logits, labels.flatten().numpy(), 0.0)
    assert plugin.validation_loss(batch, output[kind]).item() == pytest.approx(plain, rel=1e-5)


class FakeEngine:
    """Records logged values, as means over units."""

    def __init__(self, training: bool) -> None:
        self.training = training
        self.logged: dict[str, float] = {}

    def log(self, name: str, value: Any, units: Any = 1.0, finish: Any = None) -> None:
        mean = float(value) / float(units)
        self.logged[name] = finish(mean) if finish else mean


class LazyOutput:
    """Has states, a head, and lazily computed logits."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.head_weight = hidden, weight

    @property
    def logits(self) -> Tensor:
        raise AssertionError("full logits were computed")


def test_logits_are_not_read_where_they_are_not_needed() -> None:
    """Fails if inspecting an output computes full logits."""
    output = LazyOutput(torch.randn(2, 3, 5), torch.randn(7, 5))
    labels = torch.randint(7, (2, 3))
    found = LossLmPlugin(label_smoothing=0.0).loss({"labels": labels}, output)
    logits = (output.hidden @ output.head_weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_reports_perplexity_and_bits_per_byte_without_smoothing() -> None:
    """Fails if validation numbers are not comparable with others."""
    torch.manual_seed(0)
    labels = torch.tensor([[1, -100, 3], [4, 5, 6]])
    batch = {"labels": labels, "label_bytes": torch.tensor([7, 13])}
    logits = outputs()["tensor"]
    nats = smoothed(logits.flatten(0, 1).double().numpy(), labels.flatten().numpy(), 0.0)
    engine = FakeEngine(training=False)
    LossLmPlugin().loss_terms(engine, batch, logits)
    assert engine.logged == pytest.approx(
        {
            "loss": nats / 5,
            "perplexity": math.exp(nats / 5),
            "bits_per_byte": nats / math.log(2) / 20,
        },
        rel=1e-5,
    )
    engine = FakeEngine(training=True)
    LossLmPlugin().loss_terms(engine, batch, logits)
    assert engine.logged == {}


def test_labels_of_another_shape_are_refused() -> None:
    """Fails if misaligned labels silently train wrong targets."""
    with pytest.raises(DataError, match=r"\(2, 2\).*\(2, 3\)"):
        LossLmPlugin().loss({"labels": torch.zeros(2, 2, dtype=torch.long)}, outputs()["tensor"])


def test_smoothing_outside_its_range_is_refused() -> None:
    """Fails if a mistyped value is accepted."""
    with pytest.raises(ConfigError, match="label_smoothing"):
        LossLmPlugin(label_smoothing=1.5)


@pytest.mark.parametrize("shifted", [True, False])
def test_labels_that_are_the_ids_themselves_are_refused(shifted: bool) -> None:
    """Fails if a model could silently learn to copy, or text of a single letter is rejected."""
    ids = torch.randint(9, (2, 7))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1) if shifted else ids.clone()
    labels[0, :3] = -100
    plugin = LossLmPlugin()
    assert LossLmPlugin().units({"input_ids": ids * 0, "labels": labels * 0}) == 14
    if shifted:
        assert plugin.units({"input_ids": ids, "labels": labels}) == (labels != -100).sum()
    else:
        with pytest.raises(DataError, match="shift them by one"):
            plugin.units({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"prediction": torch.ones(2)}, "a dict of 'prediction'"),
        (SimpleNamespace(logits="text"), "a SimpleNamespace with 'logits'"),
        (({"a": 1}, torch.ones(2, 3)), r"a tuple of \(a dict of 'a', a tensor \(2, 3\)\)"),
        (None, "a NoneType"),
        ((), r"a tuple of \(\)"),
    ],
)
def test_output_without_logits_is_described(output: Any, said: str) -> None:
    """Fails if the user gets an AttributeError of a dict."""
    with pytest.raises(ConfigError, match=f"the model returned {said}, and the loss needs logits"):
        LossLmPlugin().loss({"labels": torch.zeros(2, 3, dtype=torch.int64)}, output)
