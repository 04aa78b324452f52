"""8-bit AdamW: close to AdamW, a quarter of its state, bitwise resume."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, Plugin
from nexus_core.plan import load
from nexus_plugins_contrib.optim_adamw8bit import OptimAdamw8BitPlugin

pytestmark = pytest.mark.skipif(  # importing it takes seconds, so not at collection
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


class Net(nn.Module):
    """A matrix large enough for 8 bits, and vectors that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(32, 256)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(x))))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :4].cumsum(1)).square().mean()


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 32, generator=generator) for _ in range(4)]


def engine_of(optimizer: Plugin[Any], *plugins: Plugin[Any], **options: Any) -> Engine:
    torch.manual_seed(3)
    return Engine(Net(), loss=loss, plugins=[optimizer, *plugins], seed=5, **options)


def test_it_trains_as_adamw_does_in_less_memory() -> None:
    """Fails if state, decay or groups differ from AdamW, or nothing is in 8 bits."""
    exact = engine_of(load("optim_adamw")(lr=3e-3, weight_decay=0.1))
    exact.fit(data(), until=40, eval_data=data())
    small = engine_of(OptimAdamw8BitPlugin(lr=3e-3, weight_decay=0.1))
    small.fit(data(), until=40, eval_data=data())
    start = engine_of(OptimAdamw8BitPlugin()).evaluate(data())["val/loss"]
    fallen = [start - engine.metrics["val/loss"] for engine in (exact, small)]
    assert fallen[1] == pytest.approx(fallen[0], rel=0.05)
    named = dict(small.model.named_parameters())
    state = small.optimizer.state[named["hidden.weight"]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert small.optimizer.state[named["head.bias"]]["state1"].dtype == torch.float32
    decays = {group["name"]: group["weight_decay"] for group in small.optimizer.param_groups}
    assert decays == {"all.matrices": 0.1, "all.others": 0.0}


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, on_disk: bool) -> None:
    """Fails if the quantized state is converted, shared or lost in a file."""

    def make(name: str) -> Engine:
        more = [load("checkpoint")(every="3 steps", sync=True)] if on_disk else []
        return engine_of(OptimAdamw8BitPlugin(lr=3e-3), *more, out=tmp_path / name)

    whole = make("whole")
    whole.fit(data(), until=7)
    first = make("parts")
    for state in first.steps(data(), until=7):
        if state.step == 3:
            break
    snapshot = copy.deepcopy(first.state_dict())
    second = make("parts")
    if on_disk:
        second.resume()
    else:
        second.load_state_dict(snapshot)
    second.fit(data(), until=7)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for one, other in zip(
        whole.optimizer.state.values(), second.optimizer.state.values(), strict=True
    ):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_groups_have_rates_of_their_own_and_follow_a_schedule() -> None:
    """Fails if the run's learning rate does not reach the update."""
    groups = [{"match": "*head*", "lr": 0.0}]
    engine = engine_of(OptimAdamw8BitPlugin(lr=1e-2, groups=groups, weight_decay=0.0))
    before = copy.deepcopy(engine.model.state_dict())
    engine.fit(data(), until=2)
    moved = {n: not torch.equal(v, before[n]) for n, v in engine.model.state_dict().items()}
    assert moved == {name: name.startswith("hidden") for name in moved}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the user gets an ImportError."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'nexus-trainer\[adamw8bit\]'"):
        engine_of(OptimAdamw8BitPlugin())
