"""The plugin fulfils the contract, and its noise has the documented variance."""

from typing import Any, ClassVar

import pytest
import torch
from nexus_core import ConfigError, Engine
from nexus_core.testing import PluginContract

from gradient_noise import GradientNoisePlugin

SIZE = 200_000


class TestGradientNoise(PluginContract):
    plugin = "gradient_noise"
    configs = ({}, {"eta": 0.3, "gamma": 1.0, "seed": 7})
    off: ClassVar[dict[str, float]] = {"eta": 0.0}


def noise(steps: int, run_seed: int = 0, **settings: Any) -> list[torch.Tensor]:
    """The noise of each step, measured with zero gradients and plain SGD."""
    model = torch.nn.Linear(SIZE, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        loss=lambda model, batch: (model.weight * batch).sum(),
        plugins=[GradientNoisePlugin(**settings)],
        seed=run_seed,
    )
    drawn, before = [], torch.zeros(1, SIZE)
    for _ in engine.steps([torch.zeros(1, SIZE)], until=f"{steps} steps"):
        drawn.append(before - model.weight.detach())
        before = model.weight.detach().clone()
    return drawn


@pytest.mark.parametrize(("eta", "gamma"), [(0.01, 0.55), (1.0, 2.0)])
def test_noise_is_gaussian_with_the_variance_of_its_step(eta: float, gamma: float) -> None:
    """Fails if the decay over steps, the square root or the distribution is wrong."""
    for t, drawn in enumerate(noise(3, eta=eta, gamma=gamma)):
        deviation = (eta * (1 + t) ** -gamma) ** 0.5
        assert drawn.std().item() == pytest.approx(deviation, rel=0.01)
        assert abs(drawn.mean().item()) < 5 * deviation / SIZE**0.5
        within = (drawn.abs() < deviation).double().mean().item()
        assert within == pytest.approx(0.6827, abs=0.006), "the share within one deviation"


def test_noise_is_new_in_each_step_and_for_each_seed() -> None:
    """Fails if a draw is repeated: it would add up over steps instead of averaging out."""
    draws = [*noise(3, gamma=0), *noise(2, run_seed=1, gamma=0), *noise(2, seed=1, gamma=0)]
    correlations = torch.corrcoef(torch.cat(draws))
    assert (correlations - torch.eye(len(draws))).abs().max() < 6 / SIZE**0.5


def test_noise_depends_only_on_seeds_and_step() -> None:
    """Fails if other random draws affect the noise, or the noise affects them."""
    first = noise(1)[0]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    plugin = GradientNoisePlugin()
    assert torch.equal(noise(1)[0], first)
    torch.set_rng_state(before)
    model = torch.nn.Linear(2, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda model, batch: model(batch).sum(),
        plugins=[plugin],
    )
    drawn = torch.get_rng_state()
    engine.fit([torch.ones(1, 2)], until="2 steps")
    assert torch.equal(torch.get_rng_state(), drawn)


def test_negative_variance_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_noise\.eta: got -1"):
        GradientNoisePlugin(eta=-1)
