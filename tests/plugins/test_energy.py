"""The energy module: which tokens are refined, and what is predicted."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nexus_plugins.loss_energy import LossEnergyPlugin
from nexus_plugins.model_nexus.energy import EnergyModule
from nexus_plugins.model_nexus.nexus import NEXUSOutput
from nexus_plugins.model_nexus.residual import Final


def module(seed: int = 0, **settings) -> EnergyModule:
    """A module in which some tokens settle early and some never, with its gate open."""
    torch.manual_seed(seed)
    sizes = {"d_code": 5, "n_memories": 12, "threshold": 0.05, "window": 3}
    made = EnergyModule(6, **{**sizes, **settings}).eval()
    with torch.no_grad():
        made.values.weight[-1] *= 20
        made.values.bias[-1] = math.log(0.05)
        made.write.gate.fill_(1.0)
    return made


def one_token_after_the_other(energy: EnergyModule, h, documents):
    """The definition of the module, for one row, without tiles, gathers or masks."""
    first, context = torch.split(energy.read(h), [5, 12], -1)
    trails, counts = [], []
    for position in range(len(h)):
        code, trail, done, count = first[position], [first[position]], False, 0
        for number in range(energy.max_iterations):
            read = [F.rms_norm(code, (5,))]
            for back in range(1, energy.window):
                there = position - back
                near = there >= 0 and documents[there] == documents[position]
                earlier = trails[there][number] if near else torch.zeros(5)
                read.append(F.rms_norm(earlier, (5,)) if near else earlier)
            values = energy.values(F.silu(energy.keys(torch.cat(read)) + context[position]))
            if not done:
                code, count = code + values[:5], count + 1
            done = done or bool(values[5].exp() < energy.threshold)
            trail.append(code)
        trails.append(trail)
        counts.append(count)
    return energy.write(torch.stack([trail[-1] for trail in trails])), counts


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    window=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_tokens_are_refined_until_they_settle_and_read_those_before_them(lengths, window, seed):
    """Fails if a token reads the wrong neighbours, or is refined after it has settled."""
    energy = module(seed, window=window, max_iterations=4)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    h = torch.randn(len(document), 6)
    with torch.no_grad():
        wanted, counts = one_token_after_the_other(energy, h, document.tolist())
        update, reports = energy(h[None], document[None])
    torch.testing.assert_close(update[0], wanted, atol=1e-5, rtol=1e-4)
    assert reports["energy"]["refinements"][0].tolist() == counts


def test_some_settle_early_and_that_is_what_is_computed():
    """Fails if easy tokens cost as much as hard ones, or these tests have no effect."""
    energy = module()
    h = torch.randn(8, 32, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counts = energy(h)[1]["energy"]["refinements"]
    assert counts.min() == 1
    assert counts.max() == 8
    layer = 2 * (5 * 3 + 6) * 12
    outside = 2 * 256 * (6 * 17 + 5 * 6)
    of_loop = counter.get_total_flops() - outside
    assert counts.sum() * layer <= of_loop <= (counts.sum() + 8 * 16) * layer


def test_a_row_has_the_same_bits_among_any_neighbours():
    """Fails if the number of other refined tokens changes a token's rounding."""
    energy = module()
    h = torch.randn(5, 23, 6)
    with torch.no_grad():
        whole = energy(h)[0]
        for _ in range(20):
            others = torch.randn(5, 23, 6)
            others[2] = h[2]
            assert torch.equal(energy(others)[0][2], whole[2])


def test_one_token_at_a_time_equals_the_whole_sequence():
    """Fails if generation differs from training."""
    energy = module()
    h, state = torch.randn(3, 17, 6), energy.initial_state(3)
    with torch.no_grad():
        whole = energy(h)[0]
        for position, token in enumerate(h.unbind(1)):
            update, state = energy.step(token, state)
            torch.testing.assert_close(update, whole[:, position], atol=1e-5, rtol=1e-4)


def observed(energy: EnergyModule, h, ids):
    """The update of sequences, and what is reported for the loss, if that is the whole model."""
    update, reports = energy(h)
    final = Final(update, update, torch.nn.Identity(), ids, h, None, reports)
    return update, energy.observe(final)["energy"]


def test_training_makes_all_refinements_and_judges_an_early_one_of_each_token():
    """Fails if the loss applies to other codes than those a token would settle with."""
    energy = module(max_iterations=3).train()
    h, ids = torch.randn(2, 30, 6), torch.randint(9, (2, 30))
    _, reports = observed(energy, h, ids)
    fewer = []
    for most in (1, 2):
        energy.max_iterations = most
        fewer.append(energy(h)[0])
    is_judged = [torch.isclose(reports["early"], one).all(-1) for one in fewer]
    assert (is_judged[0] ^ is_judged[1]).all()
    assert all(0 < row.sum() < 30 for one in is_judged for row in one)


@pytest.mark.slow
def test_effort_goes_where_the_answer_must_be_worked_out():
    """Fails if the cost of stopping early is not learned, so that all tokens take equally many."""
    torch.manual_seed(0)
    energy = EnergyModule(6, d_code=8, n_memories=32, max_iterations=5, threshold=0.05, window=3)
    head = torch.nn.Parameter(torch.randn(4, 6))
    plugin = LossEnergyPlugin()
    optimizer = torch.optim.Adam([*energy.parameters(), head], lr=1e-2)

    def batch():
        """Rows that give each symbol, or leave most to be counted on from the last one given."""
        symbols = torch.randint(4, (16, 12))
        said = (torch.arange(16) % 2 == 0).unsqueeze(1) | (torch.arange(12) % 4 == 0)
        answers = [symbols[:, 0]]
        for place in range(1, 12):
            answers.append(symbols[:, place].where(said[:, place], (answers[-1] + 1) % 4))
        h = F.pad(F.one_hot(symbols, 4) * said.unsqueeze(-1), (0, 2)).float()
        return h, torch.stack(answers, 1)

    for _ in range(250):
        h, labels = batch()
        update, reports = observed(energy, h, labels)
        output = NEXUSOutput(update, head, {"energy": reports})
        loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        of_energy = plugin.loss({"input_ids": labels, "labels": labels}, output) / labels.numel()
        optimizer.zero_grad()
        (loss + of_energy).backward()
        optimizer.step()
    h, labels = batch()
    with torch.no_grad():
        update, reports = energy.eval()(h)
    counts = reports["energy"]["refinements"]
    assert (NEXUSOutput(update, head).logits.argmax(-1) == labels).float().mean() > 0.9
    assert counts[1::2].mean() > counts[::2].mean() + 0.5


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_fewest_refinements_can_be_trained(iterations):
    """Fails if there is no early refinement to train, and training stops."""
    energy = module(max_iterations=iterations).train()
    h = torch.randn(1, 4, 6)
    update, reports = observed(energy, h, torch.zeros(1, 4, dtype=torch.long))
    assert update.shape == h.shape
    assert torch.equal(reports["early"], update) == (iterations == 1)
