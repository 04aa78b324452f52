"""The classic energy module: descent, freezing, and the distribution of iterations."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core.engine import Engine
from nexus_plugins.loss_energy import LossEnergyPlugin
from nexus_plugins.model_nexus.classic_energy import SHARPNESS, ClassicEnergyModule
from nexus_plugins.model_nexus.nexus import NEXUSOutput


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), memories=st.integers(1, 9), scale=st.sampled_from([0.01, 1.0, 30]))
def test_energy_falls_with_every_refinement_and_has_a_floor(seed, memories, scale):
    """Fails if refinement can diverge, or the loss can go to minus infinity."""
    torch.manual_seed(seed)
    module = ClassicEnergyModule(6, d_code=5, n_memories=memories, threshold=1e-9).double()
    h = torch.randn(4, 6, dtype=torch.float64) * scale
    energies = [module.energy(*[F.normalize(module.read(h), dim=-1)] * 2)]
    for most in range(1, 9):
        module.max_iterations = most
        energies.append(module(h)[1]["energy"]["final_energy"])
    path = torch.stack(energies)
    assert (path.diff(dim=0) <= 1e-12).all()
    assert (path >= -1.5).all()


def test_refinement_follows_the_gradient_of_the_energy():
    """Fails if codes do not settle at minima of the reported energy."""
    torch.manual_seed(0)
    module = ClassicEnergyModule(6, d_code=5, n_memories=4, max_iterations=1).double()
    with torch.no_grad():
        module.write.gate.fill_(1)
        module.write.projection.weight.copy_(torch.eye(6)[:, :5])
    h = torch.randn(3, 6, dtype=torch.float64)
    code = F.normalize(module.read(h), dim=-1).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(module.energy(code.detach(), code).sum(), code)
    expected = code - module.step_logit.sigmoid() * gradient
    torch.testing.assert_close(module(h)[0][:, :5], expected)


def test_a_token_does_not_depend_on_when_another_one_settles():
    """Fails if a neighbour in the batch changes a token's result."""
    torch.manual_seed(0)
    module = ClassicEnergyModule(6, threshold=0.05)
    h = torch.randn(64, 6)
    update, reports = module(h)
    counts = reports["energy"]["refinements"]
    assert counts.unique().numel() > 1, "all tokens settle together: the test would prove nothing"
    for number in range(64):
        alone, report = module(h[number : number + 1])
        torch.testing.assert_close(alone[0], update[number])
        assert report["energy"]["refinements"][0] == counts[number]


def test_settled_codes_are_frozen():
    """Fails if the threshold has no effect, or `refinements` is not the number made."""
    torch.manual_seed(0)
    h = torch.randn(32, 6)
    module = ClassicEnergyModule(6, threshold=0.1, max_iterations=40)
    update, reports = module(h)
    counts = reports["energy"]["refinements"]
    assert counts.max() < 40
    module.max_iterations = int(counts.max())
    torch.testing.assert_close(module(h)[0], update, rtol=0, atol=0)


def test_reports_match_a_loop_over_tokens_in_numpy():
    """Fails if iterations or energy differ from what the loss assumes."""
    torch.manual_seed(2)
    module = ClassicEnergyModule(
        6, d_code=5, n_memories=7, max_iterations=6, threshold=0.02
    ).double()
    h = torch.randn(9, 6, dtype=torch.float64)
    reports = module(h)[1]["energy"]
    contexts = module.read(h).detach().numpy()
    memories = module.memories.detach().numpy()
    memories = memories / np.linalg.norm(memories, axis=1, keepdims=True)
    rate = 1 / (1 + np.exp(-module.step_logit.item()))
    for number, context in enumerate(contexts / np.linalg.norm(contexts, axis=1, keepdims=True)):
        code, made, expected, chance, settled = context.copy(), 0, 0.0, 1.0, False
        for _ in range(6):
            scores = np.exp(SHARPNESS * (memories @ code))
            change = rate * (context + scores @ memories / scores.sum() - code)
            size = np.linalg.norm(change)
            if not settled:
                code, made = code + change, made + 1
            expected += chance
            chance *= size**4 / (size**4 + 0.02**4)
            settled = settled or size < 0.02
        energy = ((code - context) ** 2).sum() / 2
        energy -= np.log(np.exp(SHARPNESS * (memories @ code)).mean()) / SHARPNESS
        assert reports["refinements"][number].item() == made
        np.testing.assert_allclose(reports["iterations"][number].item(), expected)
        np.testing.assert_allclose(reports["final_energy"][number].item(), energy)


def test_expected_iterations_are_differentiable():
    """Fails if the loss cannot steer how long tokens are refined."""
    torch.manual_seed(0)
    module = ClassicEnergyModule(6, d_code=5, n_memories=4).double()
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda states: module(states)[1]["energy"]["iterations"], h)
    module(h)[1]["energy"]["iterations"].sum().backward()
    assert module.step_logit.grad.abs() > 0
    assert module.memories.grad.abs().max() > 0


class EnergyAlone(nn.Module):
    """Passes given states directly to an energy module."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = ClassicEnergyModule(32)

    def forward(self, states: Tensor) -> NEXUSOutput:
        update, reports = self.energy(states)
        return NEXUSOutput(update, torch.empty(0), reports)


def test_hard_tokens_take_more_iterations_than_repeated_ones():
    """Fails if unfamiliar tokens do not get more iterations."""
    torch.manual_seed(0)
    repeated = torch.randn(4, 32)

    def batch() -> dict[str, Tensor]:
        states = torch.cat([repeated[torch.randint(4, (8, 16))], torch.randn(8, 16, 32)], 1)
        return {"states": states, "input_ids": torch.zeros(8, 32, dtype=torch.long)}

    model = EnergyAlone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = Engine(model, optimizer, plugins=[LossEnergyPlugin(classic=True, weight=1.0)])
    engine.fit([batch() for _ in range(60)], until="60 steps")
    reports = model(batch()["states"]).module_outputs["energy"]
    for measure in ("refinements", "iterations"):
        familiar, unfamiliar = reports[measure].split(16, 1)
        assert unfamiliar.mean() > familiar.mean() + 0.5, measure
