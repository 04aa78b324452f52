"""The world-model loss compared with numpy, its units, and errors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_plugins.loss_world import LossWorldPlugin
from nexus_plugins.model_nexus import ModelNexusPlugin, NEXUSCore
from nexus_plugins.model_nexus.nexus import NEXUSOutput


def output(**reports):
    return NEXUSOutput(torch.empty(0), torch.empty(0), reports)


def a_batch(draw_from: np.random.Generator, rows: int = 3, length: int = 9):
    """Rows of short documents; the end of some rows is padding (no labels)."""
    segments = np.sort(draw_from.integers(0, 4, (rows, length)), 1)
    labels = draw_from.integers(0, 50, (rows, length))
    for row in range(rows):
        padding = int(draw_from.integers(0, length))
        labels[row, length - padding :] = -100
    return {
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "segment_ids": torch.from_numpy(segments),
        "labels": torch.from_numpy(labels),
    }


def counts(batch, row: int, position: int) -> bool:
    """Whether a position has a next token, and both are real."""
    labels, segments = batch["labels"][row].tolist(), batch["segment_ids"][row].tolist()

    def real(place: int) -> bool:
        return labels[place] != -100 or (place > 0 and labels[place - 1] != -100)

    there = position + 1
    return (
        there < len(labels)
        and segments[there] == segments[position]
        and real(position)
        and real(there)
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), with_targets=st.booleans(), scale=st.sampled_from([0.1, 1.0]))
def test_classical_loss_and_units_match_numpy(seed, with_targets, scale):
    """Fails if the formula differs from the documented one."""
    numbers = np.random.default_rng(seed)
    batch = a_batch(numbers)
    shape = (*batch["input_ids"].shape, 2, 5)
    predictions = numbers.normal(size=shape).astype(np.float32) * scale
    targets = numbers.normal(size=shape).astype(np.float32)
    mask = numbers.random(shape[:3]) < 0.7
    total, units = 0.0, 0
    for row, position in np.ndindex(shape[:2]):
        if not counts(batch, row, position):
            continue
        units += 1
        each = []
        for level in range(2):
            guess, truth = predictions[row, position, level], targets[row, position, level]
            hinge = 0.1 * max(0.0, 0.1 - guess.var())
            if not with_targets:
                each.append(hinge)
            elif mask[row, position, level]:
                each.append(((guess - truth) ** 2).mean() + hinge)
        total += np.mean(each) if each else 0.0
    reports = {"world": torch.from_numpy(predictions)}
    if with_targets:
        reports["world_targets"] = torch.from_numpy(targets)
        reports["world_mask"] = torch.from_numpy(mask)
    plugin = LossWorldPlugin(classic=True)
    assert plugin.units(batch) == units
    np.testing.assert_allclose(plugin.loss(batch, output(**reports)).item(), total, atol=1e-4)


def test_the_hinge_pushes_the_dimensions_of_a_prediction_apart():
    """Fails if a descent step makes the components of a prediction more similar."""
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    guess = (torch.randn(1, 3, 1, 8) * 0.1).requires_grad_()
    LossWorldPlugin(classic=True).loss(batch, output(world=guess)).backward()
    further = guess.detach() - 10 * guess.grad
    assert (further[:, :2].var(-1) > guess.detach()[:, :2].var(-1)).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 9999),
    with_tokens=st.booleans(),
    with_labels=st.booleans(),
    stride=st.sampled_from([None, 1, 4]),
)
def test_loss_and_units_match_numpy(seed, with_tokens, with_labels, stride):
    """Fails if the formula differs from the documented one."""
    numbers = np.random.default_rng(seed)
    batch = a_batch(numbers)
    rows, length = batch["input_ids"].shape
    batch["input_ids"] = torch.from_numpy(numbers.integers(0, 50, (rows, length)))
    if not with_labels:
        del batch["labels"]
    blocks = range(0, length, stride or 1)
    starts = np.array([
        [numbers.integers(first, min(first + (stride or 1), length)) for first in blocks]
        for _ in range(rows)
    ])  # fmt: skip
    count = len(blocks)
    world, targets = numbers.normal(size=(2, rows, count, 2, 5)).astype(np.float32)
    heads = numbers.normal(size=(rows, count, 3, 5)).astype(np.float32)
    head = numbers.normal(size=(50, 5)).astype(np.float32)
    segments = batch["segment_ids"].numpy()
    ids = batch["input_ids"].numpy()
    last = np.full((rows, 1), -100)
    labels = batch["labels"].numpy() if with_labels else np.concatenate([ids[:, 1:], last], 1)
    mask = numbers.random((rows, count, 2)) < 0.7

    def nats(state, row, place):
        wanted = labels[row, place] if place < length else -100
        logits = head @ state
        return 0.0 if wanted == -100 else np.log(np.exp(logits).sum()) - logits[wanted]

    def real(row, place):
        given = batch["labels"].numpy() if with_labels else None
        return given is None or given[row, place] != -100 or (
            place > 0 and given[row, place - 1] != -100
        )  # fmt: skip

    def reaches(row, place, ahead):
        there = place + ahead
        same = there < length and segments[row, there] == segments[row, place]
        return bool(same and real(row, place) and real(row, there))

    latents = of_states = of_heads = 0.0
    for row, block in np.ndindex(rows, count):
        place = starts[row, block]
        for level in range(2):
            if reaches(row, place, 1) and mask[row, block, level]:
                off = np.abs(world[row, block, level] - targets[row, block, level])
                latents += np.where(off < 1, off**2 / 2, off - 0.5).mean() / 2
                of_states += nats(world[row, block, level], row, place + level + 1) / 2
        for ahead in (1, 2, 3):
            if reaches(row, place, ahead):
                of_heads += nats(heads[row, block, ahead - 1], row, place + ahead) / 3
    made = {"world": world, "world_targets": targets, "world_mask": mask}
    made |= {"world_heads": heads} if with_tokens else {}
    made |= {} if stride is None else {"world_starts": starts}
    reports = {name: torch.from_numpy(value) for name, value in made.items()}
    reports |= {} if stride is None else {"world_stride": stride}
    plugin = LossWorldPlugin(latent_weight=0.7, token_weight=0.3, head_weight=0.2)
    total = 0.7 * latents + with_tokens * (0.3 * of_states + 0.2 * of_heads)
    total *= stride or 1
    assert plugin.units(batch) == sum(reaches(*place, 1) for place in np.ndindex(rows, length))
    result = NEXUSOutput(torch.empty(0), torch.from_numpy(head), reports)
    np.testing.assert_allclose(plugin.loss(batch, result).item(), total, rtol=1e-4, atol=1e-4)


def test_predicted_states_do_not_move_the_head():
    """Fails if predicted states train the output matrix."""
    head = torch.randn(9, 5, requires_grad=True)
    state = torch.randn(1, 4, 2, 5, requires_grad=True)
    mask = torch.ones(1, 4, 2, dtype=torch.bool)
    reports = {"world": state, "world_targets": state.detach(), "world_mask": mask}
    reports["world_heads"] = torch.randn(1, 4, 0, 5)
    batch = {"input_ids": torch.arange(4)[None]}
    LossWorldPlugin().loss(batch, NEXUSOutput(torch.empty(0), head, reports)).backward()
    assert state.grad.abs().max() > 0
    assert head.grad is None


def test_defaults_are_those_of_the_full_model():
    """Fails if a default of the documented table has changed."""
    config = LossWorldPlugin(classic=True).config
    assert (config.weight, config.variance_weight, config.variance_floor) == (0.1, 0.1, 0.1)
    assert (config.decay, config.decay_schedule) == (0.996, "constant")
    assert LossWorldPlugin().config.weight == 1.0
    assert LossWorldPlugin(classic=True, weight=0.3).config.weight == 0.3


@pytest.mark.parametrize("mark", ["attention_mask", "segment_ids"])
def test_what_stands_in_the_padding_does_not_matter(mark):
    """Fails if latents are trained to predict padding."""
    torch.manual_seed(0)
    model = NEXUSCore(vocab_size=9, d_model=16, ssm_n_layers=1, ssm_head_dim=8).eval()
    ids, real = torch.randint(9, (2, 12)), torch.arange(12) < torch.tensor([[7], [12]])
    labels = ids.roll(-1, 1).where(real.roll(-1, 1) & (torch.arange(12) < 11), -100)
    found = []
    for padding in (0, 5):
        batch = {"input_ids": ids.where(real, padding), "labels": labels, mark: real.long()}
        engine = SimpleNamespace(model=model)
        result = ModelNexusPlugin().forward(engine, batch)
        found.append(LossWorldPlugin().loss(batch, result).item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Blind(nn.Module):
    """A model without a world module, which declares this or not."""

    def __init__(self, says_so: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        if says_so:
            self.active_modules = ("reason",)

    def forward(self, input_ids):
        return output(reason=self.weight)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_model_without_the_module_is_refused(says_so):
    """Fails if the user gets a KeyError, or nothing, instead of the setting to enable."""
    model = Blind(says_so)
    engine = Engine(model, torch.optim.SGD(model.parameters()), plugins=[LossWorldPlugin()])
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(ConfigError, match=r"ModelNexusPlugin\(world=True\).*LossWorldPlugin"):
        engine.fit([batch], until="1 steps")
