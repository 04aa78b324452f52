"""Offloaded activations: bitwise the same training, with less device memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nexus_core import ConfigError, Engine
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.offload import OffloadPlugin
from nexus_plugins.recompute import RecomputePlugin


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def engine_of(*plugins: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    return Engine(model, optimizer, loss=loss, plugins=plugins, seed=1)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(3)]


def copying(**settings: Any) -> OffloadPlugin:
    return OffloadPlugin(without_cuda="copy", min_kib=0, **settings)


@pytest.mark.parametrize("others", [[], [AmpPlugin], [RecomputePlugin]])
@pytest.mark.parametrize("settings", [{}, {"match": ["[02]"]}])
def test_training_is_the_same_to_the_bit(others: list[Any], settings: dict[str, Any]) -> None:
    """Fails if a restored tensor has another layout, precision or device."""

    def trained(*plugins: Any) -> Engine:
        made = [c(**({"match": ["[012]"]} if c is RecomputePlugin else {})) for c in others]
        engine = engine_of(*made, *plugins)
        engine.fit(data(), until="4 steps", eval_data=data())
        return engine

    plain, moved = trained(), trained(copying(**settings))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, moved.model.state_dict()[name]), name
    assert plain.metrics == moved.metrics


def kept_after_forward(*plugins: Any) -> tuple[int, int]:
    """Bytes saved by autograd: in the model's own tensors, and in copies of them."""
    engine = engine_of(*plugins)
    engine.hook.on_start(engine=engine)
    alive = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):  # outside the plugin's hooks
        engine.model(data()[0])
    return len(alive), sum(tensor.nbytes for tensor in alive)


def test_no_activation_of_the_chosen_modules_stays() -> None:
    """Fails if the modules keep their activations on the device in addition to the copies."""
    assert kept_after_forward()[0] > 10
    assert kept_after_forward(copying())[0] == 0
    some = kept_after_forward(copying(match=["[01]"]))[0]
    assert 0 < some < kept_after_forward()[0]


@pytest.mark.parametrize(
    ("settings", "copies"), [({}, True), ({"min_kib": 1000}, False)], ids=["all", "large alone"]
)
def test_weights_and_small_tensors_are_not_copied(
    settings: dict[str, Any], copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if weights, or thousands of small tensors, are copied in every step."""
    engine = engine_of(OffloadPlugin(**{"without_cuda": "copy", "min_kib": 0, **settings}))
    weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    seen: list[bool] = []
    clone = Tensor.clone

    def noted(tensor: Tensor, **given: Any) -> Tensor:
        seen.append(tensor.untyped_storage().data_ptr() in weights)
        return clone(tensor, **given)

    engine.hook.on_start(engine=engine)
    monkeypatch.setattr(Tensor, "clone", noted)
    engine.model(data()[0]).sum().backward()
    assert bool(seen) is copies
    assert not any(seen)


def test_a_device_without_memory_of_its_own_is_refused() -> None:
    """Fails if a CPU run pays for copies that save nothing."""
    with pytest.raises(ConfigError, match=r"from CUDA to CPU memory.*is on cpu.*RecomputePlugin"):
        engine_of(OffloadPlugin()).fit(data(), until=1)


def test_a_pattern_that_matches_nothing_is_refused_and_the_model_is_given_back() -> None:
    """Fails if a misspelt pattern silently has no effect, or a run leaves its wrappers."""
    with pytest.raises(ConfigError, match=r"offload\.match: the pattern '\*\.blok' matches no"):
        engine_of(copying(match=["*.blok"])).fit(data(), until=1)
    engine = engine_of(copying())
    engine.fit(data(), until=1)
    assert all("forward" not in vars(module) for module in engine.model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_same_bits_in_less_memory() -> None:
    """Fails if a copy is read before it is complete, or memory is not freed."""

    def run(*plugins: Any) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(12)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = lambda m, b: m(b).square().mean()  # noqa: E731
        engine = Engine(model.cuda(), optimizer, loss=loss, plugins=plugins, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        engine.fit([torch.ones(8192, 512)], until=3)
        return engine.model.state_dict(), torch.cuda.max_memory_allocated()

    (plain, most), (moved, less) = run(), run(OffloadPlugin(min_kib=64))
    assert all(torch.equal(plain[name], moved[name]) for name in plain)
    assert less < 0.7 * most
