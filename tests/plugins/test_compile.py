"""Compilation: the same training, of the modules that were chosen, and given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from nexus_core import ConfigError, Engine
from nexus_plugins.compile import CompilePlugin
from nexus_plugins.recompute import RecomputePlugin

# PyTorch's compiler warns of its own doings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


def engine_of(*plugins: Any, model: nn.Module | None = None) -> Engine:
    torch.manual_seed(0)
    model = model or Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    return Engine(model, optimizer, loss=loss, plugins=plugins, log_every=1)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(3)]


def compiled(engine: Engine) -> list[str]:
    return [n for n, m in engine.model.named_modules() if m._compiled_call_impl is not None]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [f"blocks.{number}" for number in range(5)]),
        ({"match": ["*.head"]}, ["head"]),
        ({"match": ["*.blocks.[02]"]}, ["blocks.0", "blocks.2"]),
    ],
)
def test_the_chosen_modules_run_compiled_and_are_given_back(
    config: dict[str, Any], expected: list[str]
) -> None:
    """Breaks if nothing is compiled, the wrong part is, or names of parameters change."""
    plain, engine = engine_of(), engine_of(CompilePlugin(backend="aot_eager", **config))
    plain.fit(data(), until="3 steps")
    for _ in engine.steps(data(), until="3 steps"):
        assert compiled(engine) == expected
    assert compiled(engine) == []
    assert engine.metrics["compile/graphs"] >= 1
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(engine.model.state_dict()[name], value)


def test_equal_blocks_share_one_graph() -> None:
    """Breaks if a deep model is compiled once per layer: minutes instead of seconds."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    engine_of(CompilePlugin(backend="aot_eager")).fit(data(), until="2 steps")
    graphs = counters["stats"]["unique_graphs"] - before
    assert graphs <= 2, "one where the input needs no gradient, one for all others"


def test_a_model_without_lists_is_compiled_whole() -> None:
    """Breaks if the default chooses nothing and says nothing."""
    engine = engine_of(CompilePlugin(backend="aot_eager"), model=nn.Sequential(nn.Linear(8, 1)))
    for _ in engine.steps(data(), until="1 step"):
        assert compiled(engine) == [""]


class Featured(Stack):
    """Is run by a method other than `forward`, as models with a head of their own are."""

    def hidden(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x)


def test_the_whole_model_is_one_graph_and_its_method_is_given_back() -> None:
    """Breaks if `whole` leaves the method that plugins call as it was, or does not undo it."""
    torch.manual_seed(0)
    models = [Featured(), Featured()]
    models[1].load_state_dict(models[0].state_dict())
    plain = engine_of(model=models[0])
    engine = engine_of(CompilePlugin(backend="aot_eager", whole=True), model=models[1])
    plain.fit(data(), until="3 steps")
    for _ in engine.steps(data(), until="3 steps"):
        assert compiled(engine) == [""]
        assert "hidden" in vars(engine.model)
    assert "hidden" not in vars(engine.model)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(engine.model.state_dict()[name], value)


def test_it_goes_with_recomputation_and_resumes_to_the_same_bits() -> None:
    """Breaks if compiled code does not see the wrapped modules, or resuming is not exact."""

    def fresh() -> Engine:
        return engine_of(CompilePlugin(backend="aot_eager"), RecomputePlugin())

    whole, first, second = fresh(), fresh(), fresh()
    whole.fit(data(), until="4 steps")
    first.fit(data(), until="2 steps")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(data(), until="4 steps")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_what_is_saved_for_the_backward_pass_stays_for_a_second_one() -> None:
    """Breaks if compiled code may reuse its buffers: pcgrad's second term then finds them gone."""
    before = functorch_config.donated_buffer
    for _ in (engine := engine_of(CompilePlugin(backend="aot_eager"))).steps(
        data(), until="1 step"
    ):
        assert not functorch_config.donated_buffer
    assert engine.state.step == 1
    assert functorch_config.donated_buffer == before


@pytest.mark.slow
def test_the_default_compiler_trains_to_the_same_losses() -> None:
    """Breaks if generated code computes something else."""
    plain, engine = engine_of(), engine_of(CompilePlugin())
    expected = plain.fit(data(), until="6 steps", eval_data=data()).metrics["val/loss"]
    got = engine.fit(data(), until="6 steps", eval_data=data()).metrics["val/loss"]
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"match": ["*.blok*"]}, r"compile\.match: the pattern '\*\.blok\*' matches no module"),
        ({"whole": True, "match": ["*.head"]}, "set only one"),
        (
            {"backend": "inducto"},
            "compile.backend is 'inducto', which is not available; known: .*indu",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(config: dict[str, Any], words: str) -> None:
    """Breaks if a misspelt setting leaves the model uncompiled in silence."""
    with pytest.raises(ConfigError, match=words):
        engine_of(CompilePlugin(**config)).fit(data(), until="1 step")


def test_a_machine_without_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the user gets a page of traceback from inside the compiler instead."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler on the CPU"):
        engine_of(CompilePlugin()).fit(data(), until="1 step")
