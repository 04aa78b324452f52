"""Muon with AdamW: which trains what, orthogonal updates, and a single interface."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.lr_linear import LrLinearPlugin
from nexus_plugins.optim_muon import Muon, MuonAndAdamw, OptimMuonPlugin


class Tiny(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 1)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.block(self.embedding(ids)))
        hidden = self.conv(self.wide(hidden).mT).mT
        return self.head(hidden).square().mean()


def engine_of(*plugins: Any, model: nn.Module | None = None, **config: Any) -> Engine:
    torch.manual_seed(0)
    return Engine(
        model or Tiny(),
        loss=lambda m, b: m(b),
        plugins=[OptimMuonPlugin(**config), *plugins],
        log_every=1,
    )


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (2, 5), generator=generator) for _ in range(3)]


def trained_by_muon(engine: Engine) -> set[str]:
    engine.fit(data(), until="1 step")
    state = engine.optimizer.state
    return {n for n, p in engine.model.named_parameters() if "momentum_buffer" in state[p]}


def test_muon_trains_the_hidden_matrices_alone() -> None:
    """Fails if an embedding, a head or a vector gets orthogonal updates, or a matrix does not."""
    engine = engine_of()
    assert trained_by_muon(engine) == {"block.weight", "wide.weight"}
    everyone = [id(p) for group in engine.optimizer.param_groups for p in group["params"]]
    assert sorted(everyone) == sorted(id(p) for p in engine.model.parameters())
    assert trained_by_muon(engine_of(exclude=["*.wide*"])) == {"block.weight"}


class Decoder(nn.Module):
    """The shapes of a decoder with positions, whose sizes may be equal by coincidence."""

    def __init__(self, vocabulary: int, positions: int, width: int, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        block = {"mix": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in block.items()})
            for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            hidden = hidden + block["down"](block["up"](block["mix"](hidden)).tanh())
        return self.head(hidden).square().mean()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "positions", "width"), [(50, 8, 8), (50, 32, 8), (32, 5, 8), (13, 24, 8)]
)
def test_sizes_that_agree_by_chance_take_no_matrix_from_muon(
    vocabulary: int, positions: int, width: int, tied: bool
) -> None:
    """Fails if block matrices count as heads because positions and channels are equal in number.

    GPT-2 medium has 1,024 of both; four times as many positions as channels is common, and so is a
    vocabulary of bytes that equals an inner width.
    """
    torch.manual_seed(0)
    engine = engine_of(model=Decoder(vocabulary, positions, width, tied))
    inside = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("mix", "up", "down")}
    assert trained_by_muon(engine) == inside
    (line,) = engine.hook.summarize(engine=engine)
    assert line["muon"].startswith("trained 6 matrices")


def test_a_head_that_reads_another_width_than_the_embedding_has_is_one() -> None:
    """Fails if a head on wider states gets orthogonal updates."""
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.Linear(8, 11))
    engine = Engine(
        model, loss=lambda m, b: m(b).square().mean(), plugins=[OptimMuonPlugin()], log_every=1
    )
    assert trained_by_muon(engine) == {"1.weight"}


def test_its_updates_are_orthogonal_and_as_long_as_agreed() -> None:
    """Fails if a matrix update keeps the gradient's spectrum, or its RMS is not 0.2 lr."""
    torch.manual_seed(0)
    model = Tiny()
    ids = torch.randint(11, (64, 16), generator=torch.Generator().manual_seed(1))
    engine = engine_of(model=model, lr=0.1, weight_decay=0.0)
    before = model.wide.weight.detach().clone()
    model(ids).backward()
    spread = torch.linalg.svdvals(model.wide.weight.grad)
    engine.fit([ids], until="1 step")
    values = torch.linalg.svdvals((before - model.wide.weight.detach()) / 0.1) / (0.2 * 8**0.5)
    assert spread[0] / spread[3] > 4
    assert values[0] / values[3] < 2
    assert 0.6 < float(values[3]) < float(values[0]) < 1.3


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_its_matrices_are_those_of_pytorchs_muon(adjust: Any, nesterov: bool) -> None:
    """Fails if the update differs from PyTorch's by more than bfloat16 rounding.

    Or if a learning rate on the device, as in a graph, gives another one.
    """
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 5), torch.randn(3, 12, 5)
    settings = {"lr": 0.1, "weight_decay": 0.5, "nesterov": nesterov, "adjust_lr_fn": adjust}
    ends = []
    for kind, rate in ((Muon, 0.1), (torch.optim.Muon, 0.1), (Muon, torch.tensor(0.1))):
        matrix = nn.Parameter(start.clone())
        optimizer = kind([matrix], **settings)
        optimizer.param_groups[0]["lr"] = rate
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        ends.append(matrix.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.03 * ends[1].norm()
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-4, atol=1e-6)


def test_the_rest_is_trained_as_by_adamw() -> None:
    """Fails if AdamW's part uses Muon's settings: its first step moves by lr."""
    engine = engine_of(lr=0.01, eps=1e-12, weight_decay=0.0)
    before = engine.model.head.weight.detach().clone()
    engine.fit(data(), until="1 step")
    moved = (engine.model.head.weight.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=1e-6)


def test_to_the_outside_it_is_one_optimizer() -> None:
    """Fails if schedule, clipping or fp16 scaling reach only one of the two."""
    amp = AmpPlugin(dtype="fp16", initial_scale=2.0**30)
    schedule = LrLinearPlugin(warmup=0, min_lr=0)
    engine = engine_of(schedule, ClipPlugin(), amp, groups=[{"match": "*.conv*", "lr": 0.05}])
    rates = []
    for state in engine.steps(data(), until="40 steps"):
        rates.append({g["name"]: g["lr"] / g["initial_lr"] for g in engine.optimizer.param_groups})
        assert list(rates[-1].values()) == pytest.approx([1 - (state.step - 1) / 40] * 4)
    assert {"all.matrices", "all.others", "*.conv*.matrices", "*.conv*.others"} == set(rates[0])
    assert engine.metrics["amp/skipped_steps"] > 0
    assert engine.metrics["train/loss"] < 0.5
    assert isinstance(engine.optimizer, MuonAndAdamw)


def test_a_resumed_run_ends_in_the_same_bits() -> None:
    """Fails if either part loses its momentum in a checkpoint."""
    whole, first, second = (engine_of(lr=0.02) for _ in range(3))
    whole.fit(data(), until="7 steps")
    first.fit(data(), until="3 steps")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(data(), until="7 steps")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_a_model_without_matrices_is_refused() -> None:
    """Fails if a run silently trains without Muon."""
    with pytest.raises(ConfigError, match=r"no matrix for Muon.*OptimAdamwPlugin"):
        engine_of(model=nn.LayerNorm(3))


def test_a_model_of_matrices_alone_needs_no_second_optimizer() -> None:
    """Fails if an empty AdamW stops the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    plugin = OptimMuonPlugin(lr=0.1)
    engine = Engine(model, loss=lambda m, b: m(b).square().mean(), plugins=[plugin], log_every=1)
    first = engine.fit([torch.ones(2, 3)], until="1 step").metrics["train/loss"]
    assert engine.fit([torch.ones(2, 3)], until="20 steps").metrics["train/loss"] < first


@pytest.mark.parametrize("kind", ["skipped", "taken"])
def test_a_flag_on_the_device_decides_whether_a_step_is_taken(kind: str) -> None:
    """Fails if a refused step changes anything, or a flag that is not set changes the result."""
    engines = [engine_of(), engine_of()]
    for engine in engines:
        engine.fit(data(), until="2 steps")
    flagged, plain = (engine.optimizer for engine in engines)
    before = copy.deepcopy((engines[0].model.state_dict(), flagged.state_dict()["state"]))
    for engine in engines:
        for parameter in engine.model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if kind == "skipped" else 0.5)
    assert flagged._step_supports_amp_scaling
    flagged.found_inf = torch.tensor(float(kind == "skipped"))
    flagged.step()
    if kind == "skipped":
        wanted = before
    else:
        plain.step()
        wanted = engines[1].model.state_dict(), plain.state_dict()["state"]
    got = engines[0].model.state_dict(), flagged.state_dict()["state"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_gradients_are_divided_by_a_scale() -> None:
    """Fails if the scale of a gradient scaler is ignored, or remains in the parts."""
    engines = [engine_of(), engine_of()]
    for factor, engine in zip((1.0, 1024.0), engines, strict=True):
        for parameter in engine.model.parameters():
            parameter.grad = torch.ones_like(parameter) * factor
    plain, scaled = (engine.optimizer for engine in engines)
    scaled.grad_scale = torch.tensor(1024.0)
    scaled.found_inf = torch.tensor(0.0)
    for optimizer in (plain, scaled):
        optimizer.step()
    torch.testing.assert_close(
        engines[1].model.state_dict(), engines[0].model.state_dict(), rtol=0, atol=0
    )
    assert not any(hasattr(part, "grad_scale") for part in scaled._parts)
