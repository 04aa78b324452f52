"""A loss by import path: means and sums, units, metrics, and error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import called
from nexus_core import Batch, ConfigError, DataError, Engine
from nexus_core.testing import tiny_model
from nexus_plugins._shared.calls import Call
from nexus_plugins.loss import LossPlugin
from nexus_plugins.loss.criterion import Criterion


def gradient(loss: LossPlugin, batches: list[Batch], model: nn.Module) -> dict[str, Tensor]:
    """The gradient of one step over all batches, as the change made by SGD."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Engine(model, optimizer, plugins=[loss], accumulate=len(batches)).fit(batches, until="1 steps")
    return {name: before[name] - value for name, value in model.state_dict().items()}


def text(rows: int, start: int = 0) -> dict[str, Tensor]:
    samples = [called.Rows(24)[index] for index in range(start, start + rows)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


LOSSES: list[dict[str, Any]] = [
    {"call": "called:mean_next_id"},
    {"call": "called:next_id", "units": "called:labels"},
    {"call": "torch.nn:CrossEntropyLoss", "args": {"weight": [0.5] * 6 + [2.0] * 7}},
    {"call": "torch.nn.functional:cross_entropy", "args": {"weight": [0.5] * 6 + [2.0] * 7}},
]


class Channels(nn.Module):
    """The tiny model with classes in the dimension PyTorch's cross-entropy expects: `(B, V, T)`."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.model, self.last = tiny_model(dropout=0.0), last

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids)
        return logits if self.last else logits.transpose(1, 2)


@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: settings["call"])
def test_a_step_has_the_gradient_of_all_its_labels_however_it_is_split(
    settings: dict[str, Any],
) -> None:
    """Fails if a mean is weighted by micro-batches, rows or classes wrongly."""
    parts = [text(1, 1), text(4, 2), text(2, 8)]
    parts[2]["labels"][:] = called.NO_LABEL  # a batch without labels, whose mean is nan
    torch.manual_seed(0)
    model = Channels(last="called" in settings["call"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    split = gradient(LossPlugin(**settings), parts, model)
    model.load_state_dict(state)
    model.zero_grad()
    logits = model(joined(parts)["input_ids"])
    weight = settings.get("args", {}).get("weight")
    F.cross_entropy(
        logits.transpose(1, 2) if model.last else logits,
        joined(parts)["labels"],
        weight=torch.tensor(weight) if weight else None,
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(split[name], parameter.grad, rtol=1e-4, atol=1e-6)


@given(
    mean=st.floats(width=32, allow_nan=False, allow_infinity=False), units=st.integers(1, 1 << 24)
)
def test_a_mean_over_one_micro_batch_is_itself_to_the_bit(mean: float, units: int) -> None:
    """The law behind equality with a handwritten loop: (mean * units) / units is the mean."""
    leaf = torch.tensor(mean, requires_grad=True)
    criterion = Criterion("loss", Call(call="torch.nn.functional:mse_loss"), None, None)
    criterion.function = criterion.function.__class__(lambda output, target: output, "", "loss")
    total = criterion.sum((0, 0), leaf, torch.tensor(units)) / float(units)
    total.backward()
    assert total.float().item() == mean
    assert leaf.grad is not None
    assert leaf.grad.item() == 1.0


def test_evaluation_and_metrics_are_means_over_the_whole_set() -> None:
    """Each return type: a mean over rows, a number per row, a sum with its units."""
    metrics = {
        "accuracy": "called:accuracy",
        "right": "called:right",
        "pair": {"call": "called:pair", "args": {"scale": 2.0}},
    }
    loss = LossPlugin(call="torch.nn:CrossEntropyLoss", metrics=metrics)
    torch.manual_seed(0)
    net = called.Net()
    batches = list(called.batches([30, 7, 13]))
    found = Engine(net, torch.optim.SGD(net.parameters(), 0.1), plugins=[loss]).evaluate(batches)
    net.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    accuracy = (net(x).argmax(1) == y).float().mean().item()
    assert found["val/loss"] == pytest.approx(F.cross_entropy(net(x), y).item())
    assert found["val/accuracy"] == pytest.approx(accuracy)
    assert found["val/right"] == pytest.approx(accuracy)
    assert found["val/pair"] == pytest.approx(2 * accuracy)


@pytest.mark.parametrize(
    ("batch", "settings"),
    [
        ({"x": 1, "label": 5}, {}),
        ((1, 5), {}),
        ((1, 2, 5), {"target": 2}),
        ({"x": 1, "labels": 3, "class": 5}, {"target": "class"}),
    ],
)
def test_targets_are_found(batch: Batch, settings: dict[str, Any]) -> None:
    criterion = Criterion("loss", Call(call="called:pair"), settings.get("target"), units=None)
    assert criterion.target(batch) == 5


@pytest.mark.parametrize(
    ("batch", "settings", "said"),
    [
        ({"x": 1, "label": 5, "labels": 5}, {}, "which entry .*keys x, label, labels.*target="),
        ((1,), {}, "which entry of a batch that is a tuple of 1"),
        ({"x": 1, "klass": 5}, {"target": "class"}, "'class'.*keys x, klass.*'klass'"),
        ((1, 2), {"target": 4}, "loss.target is 4.*tuple of 2"),
    ],
)
def test_missing_targets_are_told(batch: Batch, settings: dict[str, Any], said: str) -> None:
    criterion = Criterion("loss", Call(call="called:pair"), settings.get("target"), units=None)
    with pytest.raises(DataError, match=said):
        criterion.target(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"call": "called:points"}, r"called with \(output, target\), but takes \(count\)"),
        ({"call": "called:pair", "args": {"target": 1}}, "'target' to called:pair; remove it"),
        ({"call": "called:pair", "args": {"scael": 1}}, "'loss.args.scael'.*mean 'scale'"),
        ({"call": "torch.nn:CrossEntropyLoss", "args": {"reduction": "sum"}},
         "reduction of .* is 'sum'.*'mean'.*loss.args.reduction=mean.*loss.units"),
        ({"call": "torch.nn:CrossEntropyLoss", "args": {"weight": ["a"]}}, "got .*is a tensor"),
        ({"call": "torch.nn:MSELoss", "units": "rows"}, "is 'mean'.*must be 'sum'"),
        ({"call": "called:Net"}, "has parameters that no optimizer would train"),
        ({"call": "called:pair", "metrics": {"loss": "called:pair"}}, "cannot be named 'loss'"),
        ({"call": "called:pair", "metrics": {"hits": "called:hit"}}, r"metrics\.hits.*'hits'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LossPlugin(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"call": "called:right"}, r"called:right returned a tensor of shape \(3,\).*the mean"),
        ({"call": "called:pair"}, "called:pair returned a tuple"),
        ({"call": "torch.nn:CrossEntropyLoss", "metrics": {"word": "called:word"}},
         r"loss\.metrics\.word: got a str"),
    ],
)  # fmt: skip
def test_answers_that_are_no_loss_are_told(settings: dict[str, Any], said: str) -> None:
    net = called.Net()
    engine = Engine(net, torch.optim.SGD(net.parameters(), 0.1), plugins=[LossPlugin(**settings)])
    with pytest.raises(ConfigError, match=said):
        engine.fit(list(called.batches([3])), until="1 steps")


def test_a_sum_over_rows_and_a_whole_batch() -> None:
    """As for a variational autoencoder: no targets, a sum over pixels, a mean over rows."""
    torch.manual_seed(0)
    net = called.Net(width=2)
    net.head = nn.Identity()  # type: ignore[assignment]
    loss = LossPlugin(call="called:reconstruction", units="rows")
    found = Engine(net, torch.optim.SGD(net.parameters(), 0.1), plugins=[loss]).evaluate(
        [x for x, _ in called.batches([3, 5])]
    )
    x = torch.cat([x for x, _ in called.batches([3, 5])])
    net.eval()
    assert found["val/loss"] == pytest.approx(((net(x) - x) ** 2).sum().item() / 8, rel=1e-6)
