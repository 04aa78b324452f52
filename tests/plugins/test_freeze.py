"""Freezing by schedule: frozen weights and statistics do not change, unfrozen ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, Plugin
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.freeze import FreezePlugin


def engine_of(*plugins: Plugin[Any], **options: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    return Engine(
        model, optimizer, loss=lambda m, b: m(b).square().mean(), plugins=plugins, **options
    )


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator) for _ in range(2)]


def moved(engine: Engine, until: int) -> list[set[str]]:
    """The names of the parameters and floating-point buffers that each step changes."""
    found, before = [], {}
    for name, value in engine.model.state_dict().items():
        before[name] = value.clone()
    for _ in engine.steps(data(), until=until):
        now = {name: value.clone() for name, value in engine.model.state_dict().items()}
        found.append({n for n, v in now.items() if not torch.equal(v, before[n])})
        before = now
    return found


def test_a_rule_freezes_and_thaws_when_it_says() -> None:
    """Fails if a frozen weight changes (also by decay), or is unfrozen a step too early or late."""
    rules = [
        {"match": "0.*", "until": "2 epochs"},
        {"match": "1.*", "start": "1 steps", "until": "3 steps"},
        {"match": "3.bias"},
    ]
    engine = engine_of(FreezePlugin(rules=rules))
    steps = moved(engine, 6)
    assert [any(n.startswith("0.") for n in names) for names in steps] == [False] * 4 + [True] * 2
    norm = [{n for n in names if n.startswith("1.")} for names in steps]
    assert [bool(names) for names in norm] == [True, False, False, True, True, True]
    assert not any("3.bias" in names for names in steps)
    assert all("3.weight" in names for names in steps)
    assert all(p.requires_grad for p in engine.model.parameters()), "given back as it was"
    assert engine.model[1].training  # type: ignore[index]


def test_statistics_may_go_on() -> None:
    steps = moved(engine_of(FreezePlugin(rules=[{"match": "1.*", "statistics": False}])), 1)
    assert "1.running_mean" in steps[0]
    assert "1.weight" not in steps[0]


def test_what_is_left_trains_as_without_the_frozen_part() -> None:
    """Fails if training differs from that of a manually frozen model."""
    frozen, by_hand = engine_of(FreezePlugin(rules=[{"match": "0.*"}])), engine_of()
    by_hand.model[0].requires_grad_(False)  # type: ignore[index]
    for engine in (frozen, by_hand):
        engine.fit(data(), until=5)
    pairs = zip(frozen.model.parameters(), by_hand.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("killed_at", [2, 3])
def test_a_run_that_is_resumed_thaws_when_it_would_have(killed_at: int, tmp_path: Path) -> None:
    rules = [{"match": "0.*", "until": "3 steps"}]
    whole = engine_of(FreezePlugin(rules=rules), seed=1)
    whole.fit(data(), until=6)
    saving = engine_of(FreezePlugin(rules=rules), CheckpointPlugin(every=killed_at, sync=True),
                       seed=1, out=tmp_path)  # fmt: skip
    for state in saving.steps(data(), until=6):
        if state.step == killed_at:
            break
    resumed = engine_of(FreezePlugin(rules=rules), CheckpointPlugin(every=99), seed=1, out=tmp_path)
    resumed.resume("auto")
    assert resumed.state.step == killed_at
    resumed.fit(data(), until=6)
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"match": "no.*"}], r"freeze\.rules: the pattern 'no\.\*' matches no parameter"),
        ([{"match": "*"}], "every trainable parameter is frozen at step 0"),
        ([], "at least 1 item"),
    ],
)
def test_what_cannot_be_is_refused(rules: list[dict[str, str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine_of(FreezePlugin(rules=rules)).fit(data(), until=1)
