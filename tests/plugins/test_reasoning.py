"""The reasoner: recalling and parallel rules in a loop; and the classic one, which picks rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_plugins.model_nexus import NEXUSCore
from nexus_plugins.model_nexus.classic_reasoning import ClassicReasoner
from nexus_plugins.model_nexus.reasoning import EAGERNESS, Reasoner
from nexus_plugins.modules.puzzles import hops


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    steps=st.integers(1, 5),
    rules=st.integers(1, 9),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_rules_and_halting_are_distributions(seed, steps, rules, scale):
    """Fails if the loss's entropy and the proof length are meaningless."""
    torch.manual_seed(seed)
    reasoner = ClassicReasoner(6, n_predicates=5, n_rules=rules, steps=steps)
    _, reports = reasoner(torch.randn(2, 3, 6) * scale)
    assert reports["reason"].shape == (2, 3, steps, rules)
    assert reports["reason_halting"].shape == (2, 3, steps)
    for distribution in reports.values():
        assert (distribution >= 0).all()
        torch.testing.assert_close(
            distribution.sum(-1), torch.ones(distribution.shape[:-1]), rtol=0, atol=1e-5
        )


def test_update_matches_forward_chaining_written_in_numpy():
    """Fails if the steps do not apply the chosen rules."""
    torch.manual_seed(1)
    reasoner = ClassicReasoner(6, n_predicates=5, n_rules=4, steps=3, d_symbol=7).double()
    h = torch.randn(6, dtype=torch.float64)
    got, reports = reasoner(h)
    weights = {name: value.detach().numpy() for name, value in reasoner.named_parameters()}

    def softmax(scores):
        return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)

    def meaning(symbols):
        return softmax(symbols @ weights["predicates"].T / np.sqrt(7))

    def sigmoid(value):
        return 1 / (1 + np.exp(-value))

    read = weights["read.weight"] @ h.numpy() + weights["read.bias"]
    beliefs, affinity = sigmoid(read[:5]), read[5:]
    running, result = 1.0, np.zeros(5)
    for step in range(3):
        truth = np.array(
            [
                (meaning(weights["premises"][0, rule]) @ beliefs)
                * (meaning(weights["premises"][1, rule]) @ beliefs)
                for rule in range(4)
            ]
        )
        chosen = softmax(affinity + np.log(truth))
        for_sure = sum(
            chosen[rule] * truth[rule] * meaning(weights["conclusions"][rule]) for rule in range(4)
        )
        beliefs = 1 - (1 - beliefs) * (1 - for_sure)
        halt = sigmoid((weights["halt.weight"] @ beliefs + weights["halt.bias"])[0])
        weight = running if step == 2 else running * halt
        running -= weight
        result += weight * beliefs
        np.testing.assert_allclose(reports["reason"][step].detach().numpy(), chosen)
        np.testing.assert_allclose(reports["reason_halting"][step].item(), weight)
    update = weights["write.gate"] * (weights["write.projection.weight"] @ result)
    np.testing.assert_allclose(got.detach().numpy(), update, atol=1e-12)


def test_a_chain_of_two_rules_is_learned_only_with_enough_steps():
    """Fails if more steps do not allow longer derivations.

    Rule 1: a and b imply c; rule 2: c and d imply e. From a, b and d, e follows in two steps, not
    in one.
    """

    def belief_in_e(steps: int) -> float:
        reasoner = ClassicReasoner(4, n_predicates=5, n_rules=2, steps=steps, d_symbol=5)
        with torch.no_grad():
            reasoner.predicates.copy_(torch.eye(5))
            sharp = 50 * torch.eye(5)
            reasoner.premises[0].copy_(sharp[[0, 2]])
            reasoner.premises[1].copy_(sharp[[1, 3]])
            reasoner.conclusions.copy_(sharp[[2, 4]])
            reasoner.read.weight.zero_()
            believed = torch.tensor([9.0, 9.0, -9.0, 9.0, -9.0])
            reasoner.read.bias.copy_(torch.cat([believed, torch.zeros(2)]))
            reasoner.halt.weight.zero_()
            reasoner.halt.bias.fill_(-20)  # never halts before the last step
            reasoner.write.gate.fill_(1)
            reasoner.write.projection.weight.zero_()
            reasoner.write.projection.weight[0, 4] = 1
        update, _ = reasoner(torch.zeros(1, 4))
        return update[0, 0].item()

    assert belief_in_e(1) < 0.05
    assert belief_in_e(2) > 0.4
    assert belief_in_e(4) > belief_in_e(2)


def test_every_parameter_gets_a_gradient_and_a_step_equals_the_whole():
    """Fails if part of the reasoner is never trained, or generation differs from training."""
    torch.manual_seed(0)
    reasoner = ClassicReasoner(6)
    h = torch.randn(2, 3, 6)
    update, _ = reasoner(h)
    update.square().sum().backward()
    for name, parameter in reasoner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    parts = [reasoner.step(token, ())[0] for token in h.unbind(1)]
    torch.testing.assert_close(torch.stack(parts, 1), update)


def test_reports_stay_in_float32_under_autocast():
    """Fails if probabilities are rounded to three digits, which ruins their logarithms."""
    reasoner = ClassicReasoner(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, reports = reasoner(torch.randn(2, 3, 6))
    assert {value.dtype for value in reports.values()} == {torch.float32}


def test_update_is_a_loop_of_recalling_and_all_rules_written_in_numpy():
    """Fails if a step does not apply all rules to the facts of the previous step."""
    torch.manual_seed(1)
    reasoner = Reasoner(6, n_rules=7, steps=3, window=1).double()  # attention to the token alone
    h = torch.randn(1, 1, 6, dtype=torch.float64)
    start, _ = reasoner(h)
    torch.nn.init.constant_(reasoner.gate, 1 / EAGERNESS)
    got, reports = reasoner(h)
    weights = {name: value.detach().numpy() for name, value in reasoner.named_parameters()}

    def sigmoid(value):
        return 1 / (1 + np.exp(-value))

    def normed(value):
        return value / np.sqrt(np.mean(value**2) + np.finfo(value.dtype).eps)

    facts, fired = h[0, 0].numpy(), np.zeros(7)
    for _ in range(3):
        values = weights["recall.in_proj.weight"][12:] @ normed(facts)
        facts = facts + weights["recall.out_proj.weight"] @ values
        found = weights["premises.weight"] @ normed(facts) + weights["premises.bias"]
        facts = facts + weights["conclusions.weight"] @ (found * sigmoid(found))
        fired = fired + sigmoid(found) / 3
    np.testing.assert_allclose(reports["reason"][0, 0].detach().numpy(), fired)
    np.testing.assert_allclose(got[0, 0].detach().numpy(), facts - h[0, 0].numpy(), atol=1e-12)
    assert 0 < start.abs().max() < 0.1, "a fresh reasoner hardly changes the stream"


def test_conclusions_of_a_token_reach_the_next_one_at_the_next_step():
    """Fails if a step recalls what earlier tokens knew before, or from beyond the window."""
    torch.manual_seed(0)
    reasoner = Reasoner(6, n_rules=5, steps=1, window=2)
    h = torch.randn(1, 5, 6)
    other = h.clone()
    other[:, 1] += 1
    for steps in range(1, 4):
        reasoner.steps = steps
        changed = (reasoner(h)[0] - reasoner(other)[0])[0].abs().sum(-1) > 1e-6
        assert changed.tolist() == [False, True, *(steps >= far for far in (1, 2, 3))]


@pytest.mark.slow
def test_one_more_step_answers_what_is_one_jump_further_than_any_answer_before():
    """Fails if the reasoner memorizes answers instead of learning the rule."""
    torch.manual_seed(0)
    draw, held_out = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    model = NEXUSCore(
        vocab_size=21, d_model=64, layers=["mlp"], mlp_expand=2, ssm_n_layers=1,
        reason=True, reasoning_steps=3, world=False, energy=False, window_head_dim=16,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def logits(rows):
        return model(rows["input_ids"], rows["segment_ids"])

    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50, 2 - 2 * step / 400)
        rows = hops(draw, 8, 63, places=4, most=2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(rows).flatten(0, 1), rows["labels"].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def hits(rows):
        return (logits(rows).argmax(-1) == rows["labels"])[rows["hops"] > 0].float().mean()

    known, further = (hops(held_out, 64, 64, 4, *jumps) for jumps in ((2, 1), (3, 3)))
    assert hits(known) > 0.97
    before = hits(further)
    model.parts["reason"].steps += 1
    assert hits(further) > before + 0.15, (before, hits(further))


def test_every_parameter_of_the_reasoner_is_trained_and_a_step_equals_the_whole():
    """Fails if part of the reasoner is never trained, or generation differs from training."""
    torch.manual_seed(0)
    reasoner = Reasoner(6, window=4)
    h = torch.randn(2, 9, 6)
    update, reports = reasoner(h)
    update.square().sum().backward()
    for name, parameter in reasoner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    state, stepped = reasoner.initial_state(2), []
    for token in h.unbind(1):
        one, state = reasoner.step(token, state)
        stepped.append(one)
    torch.testing.assert_close(torch.stack(stepped, 1), update, atol=1e-5, rtol=1e-5)
    reasoner.steps += 1
    with pytest.raises(ValueError, match="makes 4 steps, but its state is for 3; start with a new"):
        reasoner.step(h[:, 0], state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {one.dtype for one in reasoner(h)[1].values()} == {torch.float32}
    assert reports["reason"].shape == (2, 9, 128)
    assert reports["reason"].min() > 0
    assert reports["reason"].max() < 1
