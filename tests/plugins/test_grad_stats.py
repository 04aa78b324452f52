"""Gradient statistics: correct numbers, of the whole step, and unchanged training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nexus_core import Engine, Loss, LossConfig, Plugin
from nexus_core.plan import load
from nexus_plugins._shared.term_gradients import trunk_products
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.grad_stats import GradStatsPlugin
from tiny import RecorderPlugin


class Heads(nn.Module):
    """A trunk in two parts, two heads, and a parameter outside of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
        self.one, self.two = nn.Linear(4, 1), nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(batch) * self.scale
        return self.one(hidden), self.two(hidden)


class OnePlugin(Loss[LossConfig]):
    """Mean square of the first head."""

    head = 0

    def units(self, batch: Tensor) -> float:
        return float(len(batch))

    def loss(self, batch: Tensor, output: tuple[Tensor, Tensor]) -> Tensor:
        return (output[self.head] - 1).square().sum()


class TwoPlugin(OnePlugin):
    """Mean square of the second head."""

    head = 1


BATCH = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


def logged(*plugins: Plugin[Any], split: int = 1, steps: int = 1) -> list[dict[str, float]]:
    """Every log of a run on `BATCH`; two terms, the second with weight 3."""
    torch.manual_seed(0)
    model, keep = Heads(), RecorderPlugin()
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[OnePlugin(), TwoPlugin(weight=3.0), *plugins, keep],
        log_every=1,
        accumulate=split,
    )
    engine.fit(list(BATCH.tensor_split(split)), until=f"{steps} steps")
    return [metrics for _, metrics in keep.lines]


def gradients(loss: str = "both") -> dict[str, Tensor]:
    """The gradient at the start, found with `backward` alone."""
    torch.manual_seed(0)
    model = Heads()
    one, two = ((head - 1).square().mean() for head in model(BATCH))
    {"both": one + 3 * two, "one": one, "two": 3 * two}[loss].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def length(parts: dict[str, Tensor], start: str) -> float:
    return float(torch.cat([g.flatten() for n, g in parts.items() if n.startswith(start)]).norm())


def test_norms_are_those_of_the_modules_before_clipping() -> None:
    """Fails if a parameter is counted in the wrong module, or the clipped gradient is measured."""
    metrics = logged(ClipPlugin(max_norm=1e-3), GradStatsPlugin(terms_every=None))[0]
    found = {name: value for name, value in metrics.items() if name.startswith("grad_norm/")}
    parts = gradients()
    assert found == pytest.approx(
        {
            "grad_norm/trunk.0": length(parts, "trunk.0"),
            "grad_norm/trunk.1": length(parts, "trunk.1"),
            "grad_norm/one": length(parts, "one"),
            "grad_norm/two": length(parts, "two"),
            "grad_norm/model": length(parts, "scale"),
        },
        rel=1e-5,
    )
    shallow = logged(GradStatsPlugin(depth=1, terms_every=None))[0]
    assert shallow["grad_norm/trunk"] == pytest.approx(length(parts, "trunk"), rel=1e-5)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_terms_are_compared_over_what_they_share(split: int) -> None:
    """Fails if heads are included, weights are ignored, or only a micro-batch is measured."""
    metrics = logged(GradStatsPlugin(), split=split)[0]
    shared = {
        name: torch.cat(
            [g.flatten() for n, g in gradients(name).items() if n.startswith(("trunk", "scale"))]
        )
        for name in ("one", "two")
    }
    cosine = torch.cosine_similarity(shared["one"], shared["two"], dim=0)
    assert metrics["grad_norm/term/one"] == pytest.approx(float(shared["one"].norm()), rel=1e-4)
    assert metrics["grad_norm/term/two"] == pytest.approx(float(shared["two"].norm()), rel=1e-4)
    assert metrics["grad_cosine/one_two"] == pytest.approx(float(cosine), rel=1e-4)


def test_a_loss_scale_is_taken_out() -> None:
    """Fails if the factor of fp16, here 1,024, shows in the norms of the terms."""
    plain = logged(GradStatsPlugin())[0]
    scaled = logged(AmpPlugin(dtype="fp16", initial_scale=1024.0), GradStatsPlugin())[0]
    for name in ("grad_norm/term/one", "grad_norm/term/two", "grad_norm/trunk.0"):
        assert scaled[name] == pytest.approx(plain[name], rel=0.02)


def test_measurements_come_at_their_periods() -> None:
    """Fails if the expensive part runs in every step."""
    lines = logged(GradStatsPlugin(every=2, terms_every=3), steps=7)
    assert [i for i, line in enumerate(lines) if "grad_norm/one" in line] == [0, 2, 4, 6]
    assert [i for i, line in enumerate(lines) if "grad_cosine/one_two" in line] == [0, 3, 6]


@given(st.integers(0, 10_000), st.integers(2, 4))
def test_products_are_over_the_parameters_that_most_terms_reach(seed: int, terms: int) -> None:
    """Fails if a parameter of fewer terms counts, or a missing gradient is not a zero."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.rand(terms, 5, generator=generator) < 0.7
    values = torch.randn(terms, 5, 3, generator=generator)
    given_ = {
        f"t{i}": [values[i, j] if reach[i, j] else None for j in range(5)] for i in range(terms)
    }
    names, products = trunk_products(given_)
    most = int(reach.sum(0).max())
    trunk = (reach.sum(0) == most) & (most > 1)
    dense = (values * (reach & trunk).unsqueeze(-1)).flatten(1)
    there = [i for i in range(terms) if bool((reach & trunk)[i].any())]
    assert names == tuple(f"t{i}" for i in there)
    expected = (dense @ dense.T)[there][:, there]
    torch.testing.assert_close(products.reshape(expected.shape), expected)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("grad_stats",), ("mfu", "throughput"), ("diagnose",)])
def test_a_nexus_is_trained_to_the_same_bits(names: tuple[str, ...], tmp_path: Path) -> None:
    """Fails if measuring draws random numbers, or leaves something in the gradients."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(400)))
    settings: dict[str, dict[str, Any]] = {
        "data_text": {"train": str(corpus), "seq_len": 32, "batch_size": 2},
        "model_nexus": {
            "d_model": 16,
            "ssm_n_layers": 1,
            "ssm_head_dim": 16,
            "dropout": 0.1,
            "reason": True,
            "causal": True,
        },
        **{f"loss_{term}": {} for term in ("lm", "world", "reason", "energy", "causal")},
        "optim_adamw": {"lr": 1e-2},
        "clip": {},
    }
    watching: dict[str, dict[str, Any]] = {
        "grad_stats": {"every": 1, "terms_every": 2},
        "diagnose": {"every": 2, "probe_every": 2},
        "mfu": {"peak": 1e9},
        "throughput": {},
    }
    ends = []
    for extra in ((), names):
        wanted = {**settings, **{name: watching[name] for name in extra}}
        plugins = [load(name)(**given) for name, given in wanted.items()]
        engine = Engine(plugins=plugins, seed=1, accumulate=2, log_every=2)
        engine.fit(until="5 steps", eval_data={})
        ends.append([parameter.detach().clone() for parameter in engine.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_training_is_the_same_to_the_bit() -> None:
    """Fails if computing gradients by term has side effects."""
    ends = [
        logged(*extra, split=2, steps=6)[-1] for extra in ((), (GradStatsPlugin(terms_every=2),))
    ]
    assert ends[0]["train/total_loss"] == ends[1]["train/total_loss"]
