"""The world model: its roll-out, its targets, and no cost in generation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_core.errors import ConfigError
from nexus_plugins.loss_world import LossWorldPlugin
from nexus_plugins.model_nexus import NEXUSCore
from nexus_plugins.model_nexus.residual import Final
from nexus_plugins.model_nexus.world import RememberingWorldModel, WorldModel, starts


def observed(world: WorldModel, hidden, came, document=None, ids=None):
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long) if ids is None else ids
    return world.observe(Final(hidden, hidden, torch.nn.Identity(), ids, came, document, {}))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    levels=st.integers(1, 4),
    stride=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_roll_out_is_move_after_move_along_the_tokens_that_came(lengths, levels, stride, seed):
    """Fails if the model learns from the wrong token or across a document boundary."""
    torch.manual_seed(seed)
    world = WorldModel(5, 6, levels, heads=1, stride=stride)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    hidden, came = torch.randn(2, 1, sum(lengths), 5)
    reports = observed(world, hidden, came, document, torch.randint(9, document.shape))

    documents = document[0].tolist()
    assert reports["world_stride"] == stride
    for block, position in enumerate(reports["world_starts"][0].tolist()):
        assert block * stride <= position < (block + 1) * stride
        state = hidden[0, position]
        foreseen = state + world.heads[0](state)
        torch.testing.assert_close(reports["world_heads"][0, block, 0], foreseen)
        for level in range(levels):
            there = position + level + 1
            exists = there < len(documents) and documents[there] == documents[position]
            assert bool(reports["world_mask"][0, block, level]) is exists
            target = reports["world_targets"][0, block, level]
            assert torch.equal(target, hidden[0, there] if exists else torch.zeros(5))
            if exists:
                state = world.move(state, came[0, there])
                torch.testing.assert_close(reports["world"][0, block, level], state)


@given(length=st.integers(1, 40), stride=st.integers(1, 9), data=st.data())
def test_where_roll_outs_start_depends_on_nothing_that_comes_later(length, stride, data):
    """Fails if padding or a neighbour changes the loss of a row."""
    ids = torch.randint(50, (2, length))
    kept = data.draw(st.integers(1, length))
    places = starts(ids, stride)
    alone = starts(ids[1:, :kept], stride)
    assert torch.equal(alone[0], places[1, : alone.shape[1]].clamp(max=kept - 1))


@pytest.mark.parametrize("ids", [torch.zeros(40, 96), torch.randint(50, (40, 96))])
def test_every_position_is_as_likely_to_start_a_roll_out(ids):
    """Fails if positions are never trained, such as those of one column of fixed-size records."""
    varied = torch.cat([torch.randint(50, (40, 1)), ids.long()], 1)
    offsets = starts(varied, 4)[:, 1:24] - torch.arange(4, 96, 4)
    shares = offsets.flatten().bincount(minlength=4) / offsets.numel()
    assert (shares - 0.25).abs().max() < 0.06
    assert all(len(column.unique()) == 4 for column in offsets.unbind(1))


def test_no_gradient_passes_through_the_targets():
    """Fails if the states are trained to be easy to predict, and collapse."""
    world = WorldModel(5, 6, 2, heads=1)
    hidden = torch.randn(2, 4, 5, requires_grad=True)
    reports = observed(world, hidden, torch.randn(2, 4, 5))
    assert not reports["world_targets"].requires_grad
    assert reports["world"].requires_grad
    assert reports["world_heads"].requires_grad


def test_the_world_shapes_states_and_writes_nothing():
    """Fails if a training-only module slows generation, or changes its output."""
    sizes = {"vocab_size": 9, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 8}
    others = dict.fromkeys(("reason", "energy", "causal"), False)
    models = []
    for world in (True, False):
        torch.manual_seed(0)
        models.append(NEXUSCore(**sizes, **others, world=world).eval())
    ids = torch.randint(9, (2, 7))
    assert torch.equal(models[0](ids), models[1](ids))
    assert torch.equal(models[0].generate(ids, 5, 0), models[1].generate(ids, 5, 0))
    assert len(models[0].initial_state(2)) == len(models[1].initial_state(2))


def test_a_world_that_moves_by_a_law_is_learned():
    """Fails if moves are not trained towards the next states."""
    torch.manual_seed(0)
    world, plugin = WorldModel(4, 16, 2), LossWorldPlugin(latent_weight=1.0)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    optimizer = torch.optim.Adam(world.parameters(), lr=1e-2)
    for _ in range(200):
        came, states = torch.randn(8, 6, 4), [torch.randn(8, 4)]
        for token in came[:, 1:].unbind(1):
            states.append(states[-1] @ turn + token)
        hidden = torch.stack(states, 1)
        reports = observed(world, hidden, came)
        del reports["world_heads"]  # no tokens here
        batch = {"input_ids": torch.zeros(8, 6, dtype=torch.long)}
        output = type("Output", (), {"module_outputs": reports})()
        loss = plugin.loss(batch, output) / plugin.units(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = F.smooth_l1_loss(hidden[:, :-1], hidden[:, 1:])
    assert loss < 0.3 * still


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_memory_expects_what_followed_the_same_state_last_in_the_document(lengths, seed):
    """Fails if the memory learns the wrong move, forgets it, or keeps that of another document."""
    torch.manual_seed(seed)
    world = RememberingWorldModel(6, memory=6, chunk_length=8)
    with torch.no_grad():
        world.read.weight.copy_(torch.cat([torch.eye(6), torch.eye(6), torch.zeros(1, 6)]))
        world.read.bias.copy_(torch.tensor([0.0] * 12 + [30.0]))
        world.write.projection.weight.copy_(torch.eye(6))
        world.write.gate.fill_(1.0)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    states = torch.randint(6, document.shape)
    update, _ = world(F.one_hot(states, 6).float(), document)

    followed: dict[tuple[int, int], int] = {}
    pairs = list(zip(document[0].tolist(), states[0].tolist(), strict=True))
    for place, (number, state) in enumerate(pairs):
        if place and pairs[place - 1][0] == number:
            followed[pairs[place - 1]] = state
        known = followed.get((number, state))
        expected = torch.zeros(6) if known is None else torch.eye(6)[known]
        torch.testing.assert_close(update[0, place], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"classic": True, "token_weight": 0.5}, {"decay": 0.5}, {"variance_floor": 0.3}]
)
def test_a_setting_of_the_other_formula_is_refused(settings):
    """Fails if a setting without effect is accepted."""
    with pytest.raises(ConfigError, match="has no effect with classic"):
        LossWorldPlugin(**settings)


@pytest.mark.parametrize("setting", ["world_heads", "world_stride", "world_memory"])
def test_the_classic_model_refuses_what_it_does_not_have(setting):
    """Fails if a setting of the model without effect is accepted."""
    with pytest.raises(ValueError, match=f"{setting}=4 has no effect with classic=true"):
        NEXUSCore(classic=True, **{setting: 4})
