"""Drafting with the world model: the same tokens, or the same distribution, in fewer passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_plugins._shared.sampling import Sampling
from nexus_plugins.model_nexus import NEXUSCore
from nexus_plugins.model_nexus.drafting import generate_drafting

SIZES = {"d_model": 16, "ssm_n_layers": 2, "ssm_head_dim": 8, "ssm_d_state": 4}


def model(vocab_size: int = 7, std: float = 0.5, **settings) -> NEXUSCore:
    """A model whose drafts are often right and often wrong."""
    torch.manual_seed(0)
    made = NEXUSCore(vocab_size=vocab_size, **SIZES, **settings).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return made


@settings(max_examples=10, deadline=None)
@given(
    draft=st.integers(1, 6),
    count=st.integers(0, 9),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
    memory=st.sampled_from([0, 4]),
)
def test_the_likeliest_tokens_are_the_same_with_drafts(draft, count, rows, seed, memory):
    """Fails if drafts change the generated tokens."""
    made, draw = model(world_memory=memory), torch.Generator().manual_seed(seed)
    prompt = torch.randint(7, (rows, 4), generator=draw)
    expected = made.generate(prompt, count, temperature=0)
    assert torch.equal(made.generate(prompt, count, temperature=0, draft=draft), expected)
    assert torch.equal(made.generate(prompt[0], count, 0, draft=draft), expected[0])


class Chain(nn.Module):
    """A chain whose next token depends on the last one, and drafts of another chain."""

    def __init__(self, logits, expected) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight.data.copy_(logits.T)
        self.expected = expected @ torch.linalg.inv(logits)

    def initial_state(self, batch):
        return None

    def read(self, input_ids, states):
        return F.one_hot(input_ids, 4).float(), [None] * input_ids.shape[1]

    def foresee(self, hidden, input_ids):
        return self.expected[input_ids]


def test_sampled_tokens_have_the_distribution_without_drafts():
    """Fails if drafting changes the distribution."""
    draw = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, 4, 4, generator=draw)
    chain, sampling = Chain(logits, logits + noise), Sampling(0.8, 3, 0.95)
    prompt = torch.zeros(3, 1, dtype=torch.long)
    made = [generate_drafting(chain, prompt, 3, sampling, draw, 2)[:, 1:] for _ in range(600)]
    found = torch.bincount(torch.cat(made) @ torch.tensor([16, 4, 1]), minlength=64) / 1800
    step = sampling.chances(logits)
    wanted = (step[0, :, None, None] * step[:, :, None] * step[None]).flatten()
    assert (found[wanted == 0] == 0).all()
    error = (wanted * (1 - wanted) / 1800).sqrt()
    assert ((found - wanted).abs() <= 4.5 * error).all()


def test_a_pass_over_several_tokens_leaves_the_states_of_single_steps():
    """Fails if a rejected draft affects what follows."""
    made, ids = model(), torch.randint(7, (2, 5))
    with torch.no_grad():
        before = made.step(ids[:, 0], made.initial_state(2))[1]
        hidden, after = made.read(ids[:, 1:], before)
        states = before
        for place, token in enumerate(ids[:, 1:].unbind(1)):
            logits, states = made.step(token, states)
            torch.testing.assert_close(made.head(hidden[:, place]), logits, atol=1e-4, rtol=1e-4)
            for mine, theirs in zip(after[place], states, strict=True):
                for one, other in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"world": False}, {"classic": True}])
def test_drafts_without_a_world_model_are_refused(settings):
    """Fails if the user gets an AttributeError."""
    with pytest.raises(ValueError, match="drafting needs the world model"):
        model(**settings).generate(torch.tensor([1]), 3, draft=2)


def test_a_negative_draft_is_refused():
    """Fails if it is read as 0, or loops forever."""
    with pytest.raises(ValueError, match="draft is -1"):
        model().generate(torch.tensor([1]), 3, draft=-1)
