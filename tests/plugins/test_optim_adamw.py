"""AdamW: weight decay, groups by pattern, freezing, and the numbers of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine
from nexus_plugins.optim_adamw import OptimAdamwPlugin


class Tiny(nn.Module):
    """A small language model: embedding, norm, a block with a state parameter, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.block = nn.Linear(4, 4)
        self.state = nn.Parameter(torch.randn(2, 2))
        self.state._no_weight_decay = True  # type: ignore[attr-defined]
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.probe = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.block(self.norm(self.embedding(ids))) * (1 + self.state.sum())
        return self.lm_head(hidden).sum() + self.probe(hidden).sum()


def engine_of(model: nn.Module, **settings: Any) -> Engine:
    return Engine(
        model,
        loss=lambda model, batch: model(batch),
        plugins=[OptimAdamwPlugin(**settings)],
        log_every=1,
    )


def settings_by_name(engine: Engine) -> dict[str, Mapping[str, Any]]:
    names = {id(p): name for name, p in engine.model.named_parameters()}
    return {names[id(p)]: group for group in engine.optimizer.param_groups for p in group["params"]}


def test_defaults_are_as_documented() -> None:
    """Fails if a default changes: runs would silently train differently."""
    group = engine_of(nn.Linear(2, 2)).optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.9, 0.95), 1e-8)
    assert group["weight_decay"] == 0.01
    assert group["fused"] is True


def test_only_matrices_decay() -> None:
    """Fails if an embedding, a tied head, a norm, a bias or a marked parameter is decayed."""
    groups = settings_by_name(engine_of(Tiny(), weight_decay=0.3))
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.3}
    assert decayed == {"block.weight", "probe.weight"}
    assert {g["weight_decay"] for n, g in groups.items() if n not in decayed} == {0.0}


def test_every_parameter_is_trained_once() -> None:
    """Fails if grouping loses a parameter, or counts a tied one twice."""
    model = Tiny()
    engine = engine_of(model, groups=[{"match": "*.block*", "lr": 1e-3}])
    trained = [id(p) for group in engine.optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


def test_steps_follow_the_equations_of_the_paper() -> None:
    """Fails if fused or grouped steps differ from AdamW, written out in float64."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    batches = [torch.randn(4, 3, dtype=torch.float64) for _ in range(5)]
    lr, betas, eps, decay = 0.02, (0.8, 0.9), 1e-6, 0.1
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    means = {n: torch.zeros_like(w) for n, w in weights.items()}
    squares = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step, batch in enumerate(batches, start=1):
        output = batch @ weights["weight"].T + weights["bias"]
        gradients = {"weight": 2 * output.T @ batch / 8, "bias": 2 * output.sum(0) / 8}
        for name, gradient in gradients.items():
            means[name] = betas[0] * means[name] + (1 - betas[0]) * gradient
            squares[name] = betas[1] * squares[name] + (1 - betas[1]) * gradient**2
            mean = means[name] / (1 - betas[0] ** step)
            root = (squares[name] / (1 - betas[1] ** step)).sqrt()
            shrunk = weights[name] * (1 - lr * decay) if name == "weight" else weights[name]
            weights[name] = shrunk - lr * mean / (root + eps)
    plugin = OptimAdamwPlugin(lr=lr, betas=betas, eps=eps, weight_decay=decay)
    engine = Engine(model, loss=lambda m, b: m(b).square().mean(), plugins=[plugin])
    engine.fit(batches, until="5 steps")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-10, atol=1e-12)


def test_groups_take_their_own_settings_and_the_first_match_counts() -> None:
    """Fails if a pattern is ignored, or a later one overrides an earlier."""
    engine = engine_of(
        Tiny(),
        groups=[
            {"match": "*.block.w*", "lr": 1e-3, "weight_decay": 0.5},
            {"match": "block*", "lr": 2e-3},
        ],
    )
    groups = settings_by_name(engine)
    assert (groups["block.weight"]["lr"], groups["block.weight"]["weight_decay"]) == (1e-3, 0.5)
    assert (groups["block.bias"]["lr"], groups["block.bias"]["weight_decay"]) == (2e-3, 0.0)
    assert groups["probe.weight"]["lr"] == 1e-4
    assert engine.optimizer.param_groups[0]["lr"] == 1e-4, "the common group comes first"


def test_frozen_parameters_do_not_move() -> None:
    """Fails if decay or momentum still act on frozen parameters."""
    torch.manual_seed(0)
    model = Tiny()
    kept = model.probe.weight.detach().clone()
    moved = model.block.weight.detach().clone()
    engine = engine_of(model, lr=0.1, freeze=["probe.*", "*.norm.*"])
    engine.fit([torch.randint(7, (2, 3))], until="3 steps")
    assert torch.equal(model.probe.weight, kept)
    assert not torch.equal(model.block.weight, moved)
    assert not model.norm.bias.requires_grad


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": [{"match": "*.blok*"}]}, r"optim_adamw\.groups.*'\*\.blok\*' matches no"),
        ({"freeze": ["nothing"]}, r"optim_adamw\.freeze.*'nothing' matches no parameter"),
        ({"freeze": ["*"]}, "no parameter is left to train"),
        (
            {"groups": [{"match": "block*"}, {"match": "block.bias"}]},
            r"'block\.bias' matches no parameter without a group",
        ),
    ],
)
def test_a_pattern_without_effect_is_an_error(settings: dict[str, Any], words: str) -> None:
    """Fails if a misspelt pattern silently trains with other settings."""
    with pytest.raises(ConfigError, match=words):
        engine_of(Tiny(), **settings)


def test_a_resumed_run_ends_in_the_same_bits() -> None:
    """Fails if grouping is not a pure function of model and config."""
    batches = [torch.randint(7, (2, 3)) for _ in range(4)]

    def fresh() -> Engine:
        torch.manual_seed(3)
        return engine_of(Tiny(), lr=0.01, groups=[{"match": "*.block*", "lr": 1e-3}])

    whole = fresh()
    whole.fit(batches, until="4 steps")
    first, second = fresh(), fresh()
    first.fit(batches, until="2 steps")
    second.load_state_dict(first.state_dict())
    second.fit(batches, until="4 steps")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name
