"""The classic world model: predictions, targets, and updates of the target encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core.engine import Engine
from nexus_plugins.loss_world import LossWorldPlugin
from nexus_plugins.model_nexus.classic_world import ClassicWorldModel
from nexus_plugins.model_nexus.nexus import NEXUSOutput


class WorldAlone(nn.Module):
    """Passes given states directly to a world model; follows the contract of `LossWorldPlugin`."""

    def __init__(self, width: int, latent: int, levels: int) -> None:
        super().__init__()
        self.world = ClassicWorldModel(width, latent, levels)

    def forward(self, states: Tensor) -> NEXUSOutput:
        update, reports = self.world(states)
        return NEXUSOutput(update, torch.empty(0), reports)

    def update_world_target(self, decay: float) -> None:
        self.world.update_target(decay)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_targets_are_the_latents_ahead_within_a_document(lengths, levels, seed):
    """Fails if the model learns from the wrong token or across a document boundary."""
    torch.manual_seed(seed)
    world = ClassicWorldModel(5, 6, levels)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    h = torch.randn(1, sum(lengths), 5)
    _, reports = world(h, document)

    first, second = world.target_encoder[0], world.target_encoder[2]
    hidden = h[0].numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = hidden / (1 + np.exp(-hidden))
    latents = hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy()
    latents -= latents.mean(-1, keepdims=True)
    latents /= np.sqrt(latents.var(-1, keepdims=True) + 1e-5)

    documents = document[0].tolist()
    for position, number in enumerate(documents):
        for level in range(levels):
            there = position + 2**level
            exists = there < len(documents) and documents[there] == number
            assert bool(reports["world_mask"][0, position, level]) is exists
            expected = latents[there] if exists else np.zeros(6)
            got = reports["world_targets"][0, position, level].numpy()
            np.testing.assert_allclose(got, expected, atol=1e-4)


def test_target_encoder_moves_by_decay_and_never_by_an_optimizer():
    """Fails if targets are trained or never move, so that prediction collapses."""
    torch.manual_seed(0)
    model = WorldAlone(5, 6, 2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [value.clone() for value in model.world.target_encoder.parameters()]
    batch = {"states": torch.randn(2, 4, 5), "input_ids": torch.zeros(2, 4, dtype=torch.long)}
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    Engine(model, optimizer, plugins=[LossWorldPlugin(classic=True, decay=0.75)]).fit(
        [batch], until="1 steps"
    )

    moved = list(model.world.target_encoder.parameters())
    for before, after, source in zip(kept, moved, model.world.encoder.parameters(), strict=True):
        assert not after.requires_grad
        assert after.grad is None
        torch.testing.assert_close(after, 0.75 * before + 0.25 * source)
    assert not torch.equal(kept[0], moved[0])
    assert "world.target_encoder.0.weight" in model.state_dict()


def test_no_gradient_passes_through_the_targets():
    """Fails if the states are trained to be easy to predict, and collapse."""
    world = ClassicWorldModel(5, 6, 2)
    h = torch.randn(2, 4, 5, requires_grad=True)
    _, reports = world(h)
    assert not reports["world_targets"].requires_grad
    assert reports["world"].requires_grad


def test_one_token_at_a_time_equals_the_whole_sequence():
    """Fails if generation differs from training."""
    world = ClassicWorldModel(5, 6, 3)
    h = torch.randn(2, 7, 5)
    whole, _ = world(h)
    parts = [world.step(token, ())[0] for token in h.unbind(1)]
    torch.testing.assert_close(torch.stack(parts, 1), whole)


def test_a_periodic_sequence_is_predicted_better_than_by_its_mean():
    """Fails if the world model does not learn what comes next."""
    torch.manual_seed(0)
    period = 5
    states = torch.randn(period, 8)
    phases = torch.arange(4)[:, None] + torch.arange(32)
    batch = {"states": states[phases % period], "input_ids": torch.zeros(4, 32, dtype=torch.long)}
    model = WorldAlone(8, 8, 3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = Engine(
        model,
        torch.optim.AdamW(trained, lr=5e-3),
        plugins=[LossWorldPlugin(classic=True, weight=1.0, variance_weight=0.0)],
        log_every=1,
    )
    engine.fit([batch] * 200, until="200 steps")

    reports = model(batch["states"]).module_outputs
    targets = reports["world_targets"][reports["world_mask"]]
    mean_prediction = targets.var(0, correction=0).mean()
    assert mean_prediction > 0.1, "the latents have collapsed"
    assert engine.metrics["train/world_loss"] < 0.1 * mean_prediction


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_decay_follows_its_schedule(schedule):
    """Fails if targets move too fast late in a run, or freeze early."""
    plugin = LossWorldPlugin(classic=True, decay=0.9, decay_schedule=schedule)
    seen = []
    model = WorldAlone(5, 6, 1)
    model.update_world_target = seen.append
    batch = {"states": torch.randn(1, 4, 5), "input_ids": torch.zeros(1, 4, dtype=torch.long)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Engine(model, optimizer, plugins=[plugin]).fit([batch] * 10, until="10 steps")
    progress = np.arange(1, 11) / 10
    annealed = 1 - 0.1 * (np.cos(np.pi * progress) + 1) / 2
    np.testing.assert_allclose(seen, annealed if schedule == "cosine" else np.full(10, 0.9))
