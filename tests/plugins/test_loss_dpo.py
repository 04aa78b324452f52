"""Preference losses: the published formulas, exact for every split, with either reference."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import CheckpointError, ConfigError, DataError, Engine
from nexus_plugins._shared.token_losses import token_nats
from nexus_plugins.loss_dpo import LossDpoPlugin

VOCABULARY, WIDTH = 11, 6


class Scorer(nn.Module):
    """Next-token logits from the running mean of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        steps = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(self.dropout(self.embedding(input_ids).cumsum(1) / steps))


def pairs(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of 2 ids, followed by answers of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for side, width in (("chosen", 7), ("rejected", 9)):
        ids = torch.randint(VOCABULARY, (count, width), generator=generator)
        labels = torch.cat([ids[:, 1:], torch.full((count, 1), -100)], 1)
        labels[:, 0] = -100
        for row in range(count):
            labels[row, width - 1 - row % 3 :] = -100
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels}
    return batch


def summed(model: nn.Module, batch: dict[str, Tensor], side: str, mean: bool) -> list[float]:
    """The log-probability of each answer, token by token."""
    with torch.no_grad():
        table = model(batch[f"{side}_input_ids"]).double().log_softmax(-1)
    found = []
    for row, labels in zip(table, batch[f"{side}_labels"], strict=True):
        own = [float(row[t, y]) for t, y in enumerate(labels.tolist()) if y != -100]
        found.append(sum(own) / (len(own) if mean else 1))
    return found


def expected(
    model: nn.Module,
    before: nn.Module | None,
    batch: dict[str, Tensor],
    variant: str,
    smooth: float,
) -> float:
    """The mean loss of the pairs by the papers' formulas, in Python floats."""
    beta, total, mean = 0.3, 0.0, variant == "ipo"
    sides = [summed(model, batch, side, mean) for side in ("chosen", "rejected")]
    if before is None:
        base = [[0.0] * len(sides[0])] * 2
    else:
        base = [summed(before, batch, side, mean) for side in ("chosen", "rejected")]
    for win, lose, win_before, lose_before in zip(*sides, *base, strict=True):
        h = (win - win_before) - (lose - lose_before)
        right, flipped = math.log1p(math.exp(-beta * h)), math.log1p(math.exp(beta * h))
        total += {
            "sigmoid": (1 - smooth) * right + smooth * flipped,
            "robust": ((1 - smooth) * right - smooth * flipped) / (1 - 2 * smooth),
            "hinge": max(0.0, 1 - beta * h),
            "ipo": (h - 1 / (2 * beta)) ** 2,
        }[variant]
    return total / len(sides[0])


def engine_of(model: nn.Module, plugin: LossDpoPlugin, **options: Any) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return Engine(model, optimizer, plugins=[plugin], log_every=1, **options)


@pytest.mark.parametrize("reference", ["copy", "none"])
@pytest.mark.parametrize(
    ("variant", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)],
)
def test_losses_are_those_of_the_papers(variant: str, smoothing: float, reference: str) -> None:
    """Fails if sides, reference, labels or a formula are wrong."""
    model = Scorer()
    start = copy.deepcopy(model) if reference == "copy" else None
    chosen = {"variant": variant, "label_smoothing": smoothing, "reference": reference}
    engine = engine_of(model, LossDpoPlugin(beta=0.3, **chosen))
    for state in engine.steps([pairs(4, seed) for seed in range(3)], until="3 steps"):
        if state.step == 2:
            now = copy.deepcopy(model)
    wanted = expected(now, start, pairs(4, 2), variant, smoothing)
    assert engine.metrics["train/total_loss"] == pytest.approx(wanted, rel=1e-5)


def test_the_update_does_not_depend_on_the_split() -> None:
    """Fails if micro-batches with unequal numbers of pairs have equal weight."""
    whole = pairs(5)
    ends = []
    for cuts in ([5], [1, 4]):
        torch.manual_seed(1)
        engine = engine_of(Scorer(), LossDpoPlugin(), accumulate=len(cuts))
        parts = {name: value.split(cuts) for name, value in whole.items()}
        micro = [{n: v[i] for n, v in parts.items()} for i in range(len(cuts))]
        engine.fit(micro, until=1)
        ends.append(engine.model.head.weight.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_training_raises_the_margin_and_reports_it() -> None:
    engine = engine_of(Scorer(), LossDpoPlugin())
    result = engine.fit([pairs(6)], until=60, eval_data=[pairs(6)])
    assert result.metrics["val/loss"] < math.log(2) - 0.05
    assert engine.metrics["dpo/accuracy"] > 0.6
    rewards = engine.metrics["dpo/chosen_reward"], engine.metrics["dpo/rejected_reward"]
    assert rewards[0] - rewards[1] == pytest.approx(engine.metrics["dpo/margin"], rel=1e-4)


def test_the_reference_is_that_of_the_run_when_it_resumes() -> None:
    """Fails if the reference of a resumed run is the trained or another model."""
    torch.manual_seed(1)
    start = Scorer()
    whole = engine_of(copy.deepcopy(start), LossDpoPlugin())
    whole.fit([pairs(4)], until=4)
    first = engine_of(copy.deepcopy(start), LossDpoPlugin())
    first.fit([pairs(4)], until=2)
    again = engine_of(copy.deepcopy(start), LossDpoPlugin())
    again.load_state_dict(first.state_dict())
    again.fit([pairs(4)], until=4)
    assert torch.equal(again.model.head.weight, whole.model.head.weight)
    with pytest.raises(CheckpointError, match="copy of other weights"):
        engine_of(Scorer(), LossDpoPlugin()).load_state_dict(first.state_dict())


def broken(how: str) -> dict[str, Tensor]:
    batch = pairs(3)
    if how == "empty":
        batch["rejected_labels"][1] = -100
    else:
        batch["chosen_labels"] = batch["chosen_input_ids"].clone()
    return batch


@pytest.mark.parametrize(
    ("how", "said"),
    [("empty", "rejected_labels of row 1 .* no answer"), ("unshifted", "shift them by one")],
)
def test_pairs_that_teach_nothing_are_refused(how: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        engine_of(Scorer(), LossDpoPlugin()).fit([broken(how)], until=1)


def test_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing is for"):
        LossDpoPlugin(variant="ipo", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="the model has none; add them"):
        engine_of(Scorer(), LossDpoPlugin(reference="adapters"))
    engine = engine_of(Scorer(), LossDpoPlugin())
    nn.init.zeros_(engine.model.head.weight)
    with pytest.raises(ConfigError, match="weights were loaded after the model was built"):
        engine.fit([pairs(2)], until=1)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 6), vocabulary=st.integers(2, 7), at_once=st.integers(1, 20),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_token_losses_and_gradients_are_those_of_full_logits(
    rows: int, vocabulary: int, at_once: int, seed: int
) -> None:
    """Fails if chunks, row weights or ignored labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(
        vocabulary, 5, generator=generator, dtype=torch.float64, requires_grad=True
    )
    labels = torch.randint(vocabulary, (2, rows), generator=generator)
    labels[0, 0] = -100
    factor = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    full = nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none"
    ).view(2, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nexus_plugins._shared.token_losses.LOGITS_AT_ONCE", at_once)
        found = token_nats(SimpleNamespace(hidden=hidden, head_weight=weight), labels)
        ours = torch.autograd.grad((found * factor).sum(), (hidden, weight))
    torch.testing.assert_close(found, full)
    torch.testing.assert_close(ours, torch.autograd.grad((full * factor).sum(), (hidden, weight)))
    torch.testing.assert_close(
        token_nats(hidden @ weight.T, labels).double(), full, atol=1e-5, rtol=0
    )
