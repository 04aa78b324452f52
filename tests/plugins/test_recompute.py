"""Recomputation: bitwise the same training, with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.recompute import RecomputePlugin


class Block(nn.Module):
    """A residual block with dropout that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16)
        )
        self.runs = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.runs += 1
        return x + scale * self.inside(x)


class Stack(nn.Module):
    """A sequence of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


def engine_of(*plugins: Any, model: nn.Module | None = None) -> Engine:
    torch.manual_seed(0)
    model = model or Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    return Engine(model, optimizer, loss=loss, plugins=plugins, seed=1)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("amp", [[], ["amp"]])
def test_training_is_the_same_to_the_bit(amp: list[str]) -> None:
    """Fails if the second run draws another dropout, or computes in another precision."""
    plain = engine_of(*[AmpPlugin() for _ in amp])
    plain.fit(data(), until="4 steps")
    saving = engine_of(*[AmpPlugin() for _ in amp], RecomputePlugin())
    saving.fit(data(), until="4 steps")
    names = list(plain.model.state_dict())
    assert list(saving.model.state_dict()) == names
    for name in names:
        assert torch.equal(plain.model.state_dict()[name], saving.model.state_dict()[name]), name
    assert [block.runs for block in plain.model.blocks] == [4] * 4
    assert [block.runs for block in saving.model.blocks] == [8] * 4


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        ({"every": 2}, [2, 1, 2, 1]),
        ({"match": ["*.blocks.[13]"]}, [1, 2, 1, 2]),
        ({"match": ["blocks.0", "blocks.0.inside"]}, [2, 1, 1, 1]),
    ],
)
def test_only_the_chosen_modules_run_twice(config: dict[str, Any], runs: list[int]) -> None:
    """Fails if patterns or `every` select others, or a nested selected module runs three times."""
    engine = engine_of(RecomputePlugin(**config))
    engine.fit(data(), until="1 step")
    assert [block.runs for block in engine.model.blocks] == runs


def test_evaluation_runs_once_and_the_model_is_given_back() -> None:
    """Fails if evaluation computes gradients, or the plugin stays in the model after the run."""
    engine = engine_of(RecomputePlugin())
    engine.fit(data(), until="1 step", eval_data=data())
    assert [block.runs for block in engine.model.blocks] == [5] * 4
    assert all("forward" not in vars(module) for module in engine.model.modules())


def test_fewer_activations_are_kept() -> None:
    """Fails if autograd does not save fewer bytes between forward and backward."""

    def kept(engine: Engine) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        engine.hook.on_start(engine=engine)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = engine.model(data()[0])
        total = sum(seen.values())
        assert output.requires_grad
        return total

    assert kept(engine_of(RecomputePlugin())) < 0.5 * kept(engine_of())


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (
            None,
            {"match": ["*.blok*"]},
            r"recompute\.match: the pattern '\*\.blok\*' matches no module",
        ),
        (nn.Sequential(nn.Linear(16, 1)), {}, "no ModuleList;.*RecomputePlugin.match="),
    ],
)
def test_a_choice_of_nothing_is_refused(model: Any, config: Any, words: str) -> None:
    """Fails if a misspelt pattern silently has no effect."""
    with pytest.raises(ConfigError, match=words):
        engine_of(RecomputePlugin(**config), model=model).fit(data(), until="1 step")
