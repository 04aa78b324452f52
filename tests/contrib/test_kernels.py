"""Third-party kernels, faked by modules of the same names: correct and wrong ones."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, RunData, hookimpl
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.model_nexus import ModelNexusPlugin
from nexus_plugins.model_nexus.nexus import NEXUSCore
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from nexus_plugins_contrib.kernels import KernelsPlugin, available
from nexus_plugins_contrib.kernels.swaps import KERNELS

PACKAGES = ("mamba_ssm", "fla", "causal_conv1d", "liger_kernel")
MAMBA = '''
import torch
import torch.nn.functional as F

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None,
                              initial_states=None, seq_idx=None, cu_seqlens=None,
                              dt_softplus=False, dt_limit=(0.0, float("inf")),
                              return_final_states=False, return_varlen_states=False,
                              state_dtype=None):
    """One token after the other, in float32: (b, t, h, p), (b, t, h), (h,), (b, t, 1, n)."""
    assert B.shape[2] == C.shape[2] == 1 and A.ndim == 1
    assert seq_idx is None or seq_idx.dtype == torch.int32
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[-1], dtype=torch.float32)
    out = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        if seq_idx is not None and t:
            decay = decay * (seq_idx[:, t] == seq_idx[:, t - 1]).unsqueeze(-1)
        written = (x[:, t].float() * dt[:, t].unsqueeze(-1)).unsqueeze(-1) * B[:, t, 0, None, None]
        state = state * decay[..., None, None] + written
        out.append((state * C[:, t, 0, None, None]).sum(-1) + x[:, t].float() * D[:, None])
    return (torch.stack(out, 1) * WRONG).to(x.dtype)
'''
FLA_SCAN = '''
import torch

def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None,
                     output_final_state=False, state_v_first=False, cu_seqlens=None,
                     cu_seqlens_cpu=None, **kwargs):
    """Forget, write k v, read by q: (b, t, h, k), (b, t, h, v), gates (b, t, h)."""
    assert q.shape == k.shape and g.shape == q.shape[:3] and scale == 1.0
    state = v.new_zeros(*q.shape[:1], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        state = state + k[:, t].float().unsqueeze(-1) * v[:, t].float().unsqueeze(-2)
        out.append((state * q[:, t].float().unsqueeze(-1)).sum(-2))
    return (torch.stack(out, 1) * WRONG).to(v.dtype), None
'''
CONV = '''
import torch
import torch.nn.functional as F

def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None,
                     return_final_states=False, final_states_out=None, activation=None):
    """(b, c, t), (c, w): the last tap is the token itself; silu."""
    assert activation == "silu" and weight.shape == (x.shape[1], 4)
    total = bias[:, None].expand_as(x).float()
    for lag in range(4):
        seen = F.pad(x, (lag, 0))[..., : x.shape[2]].float()
        if seq_idx is not None:
            seen = seen * (F.pad(seq_idx, (lag, 0), value=-1)[:, : x.shape[2]] == seq_idx)[:, None]
        total = total + seen * weight[:, 3 - lag, None]
    return (F.silu(total) * WRONG).to(x.dtype)
'''
LIGER = """
import torch.nn.functional as F

def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None,
                                     ignore_index=-100, lse_square_scale=0.0,
                                     label_smoothing=0.0, reduction="mean", softcap=None,
                                     return_z_loss=False, accum_dtype=None,
                                     use_token_scaling=False, return_token_accuracy=False,
                                     return_predicted_tokens=False):
    assert reduction == "sum" and input.dtype == weight.dtype
    return WRONG * F.cross_entropy((input @ weight.T).float(), target, ignore_index=ignore_index,
                                   label_smoothing=label_smoothing, reduction="sum")
"""
FLA_LOSS = """
import torch.nn.functional as F

def fused_linear_cross_entropy_loss(x, target, weight, bias=None, ignore_index=-100,
                                    label_smoothing=0.0, logit_scale=1.0,
                                    logit_softcapping=None, num_chunks=8, reduction="mean",
                                    use_l2warp=False, l2_penalty_factor=1e-4,
                                    accumulate_grad_in_fp32=True):
    assert reduction == "sum"
    return WRONG * F.cross_entropy((x @ weight.T).float(), target, ignore_index=ignore_index,
                                   label_smoothing=label_smoothing, reduction="sum")
"""
FILES = {
    "mamba_ssm/ops/triton/ssd_combined.py": MAMBA,
    "fla/ops/simple_gla/__init__.py": FLA_SCAN,
    "fla/modules/fused_linear_cross_entropy.py": FLA_LOSS,
    "causal_conv1d/__init__.py": CONV,
    "liger_kernel/transformers/functional.py": LIGER,
}
"""The packages' functions, with their signatures and shapes, in plain PyTorch."""


class Shelf:
    """A folder on the path with fake kernel packages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, *packages: str, wrong: float = 1.0) -> None:
        """Install the packages; results are `wrong` times too large."""
        for name, source in FILES.items():
            if name.partition("/")[0] in packages:
                path = self._folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"WRONG = {wrong}\n{source}")
                for parent in path.parents:
                    if parent == self._folder:
                        break
                    (parent / "__init__.py").touch()
        importlib.invalidate_caches()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    monkeypatch.syspath_prepend(str(tmp_path / "kernels"))
    (tmp_path / "kernels").mkdir()
    yield Shelf(tmp_path / "kernels")
    for name in [n for n in sys.modules if n.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


class RowsPlugin(Plugin[PluginConfig]):
    """Three batches of ids with documents that end within a row."""

    @hookimpl
    def make_data(self) -> RunData:
        draw = torch.Generator().manual_seed(4)
        ids = [torch.randint(30, (2, 20), generator=draw) for _ in range(3)]
        document = torch.tensor([0] * 7 + [1] * 5 + [2] * 8).expand(2, -1)
        return RunData(
            [{"input_ids": i, "labels": i.roll(-1, 1), "segment_ids": document} for i in ids]
        )


def engine_with(*plugins: Plugin[Any]) -> Engine:
    model = ModelNexusPlugin(
        vocab_size=30, d_model=16, ssm_n_layers=2, ssm_head_dim=16, ssm_d_state=8,
        world=False, reason=False, energy=False, causal=False,
    )  # fmt: skip
    parts = [RowsPlugin(), model, LossLmPlugin(), OptimAdamwPlugin(lr=1e-2)]
    return Engine(plugins=[*parts, *plugins], seed=1, log_every=1)


def losses(engine: Engine, until: str = "4 steps") -> float:
    return engine.fit(until=until).metrics["train/lm_loss"]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    ("packages", "used"),
    [
        (("mamba_ssm",), {"scan": "mamba_ssm"}),
        (("fla",), {"scan": "fla", "linear_cross_entropy": "fla"}),
        (
            PACKAGES,
            {"scan": "mamba_ssm", "convolve": "causal_conv1d",
             "linear_cross_entropy": "liger_kernel"},
        ),
    ],
)  # fmt: skip
def test_a_kernel_that_passes_takes_over_and_gives_the_same_losses(
    packages: tuple[str, ...], used: dict[str, str], amp: bool, shelf: Shelf
) -> None:
    """Fails if an argument, layout, document or the order of taps is passed wrongly."""
    shelf.put(*packages)
    assert available() == sorted(packages)
    plain = losses(engine_with(*([AmpPlugin()] if amp else [])))
    plugin = KernelsPlugin(tolerance=0.05 if amp else 1e-4)
    engine = engine_with(plugin, *([AmpPlugin()] if amp else []))
    assert losses(engine) == pytest.approx(plain, rel=2e-2 if amp else 1e-4)
    assert plugin.used == used
    assert engine.metrics["kernels/used"] == len(used)
    (said,) = [a["kernels"] for a in engine.hook.summarize(engine=engine) if "kernels" in a]
    assert all(f"{name} by {package}" in said for name, package in used.items())
    kept = [vars(m) for m in engine.model.modules()] + [vars(engine.plugins["loss_lm"])]
    assert not any(name in own for own in kept for name in KERNELS), "operations are given back"


def test_a_kernel_that_is_wrong_is_refused_with_the_difference(shelf: Shelf) -> None:
    """If requested by name, it ends the run; else it is reported, and the next one is tried."""
    plain = losses(engine_with())
    shelf.put("mamba_ssm", "fla", "liger_kernel")
    shelf.put("mamba_ssm", wrong=1.05)
    plugin = KernelsPlugin()
    with pytest.warns(RuntimeWarning) as said:
        found = losses(engine_with(plugin))
    (text,) = {str(w.message) for w in said}
    assert "scan by mamba_ssm differs from float32 by a relative 0.05" in text
    assert "the limit is 0.02; it is not used" in text
    assert plugin.used == {"scan": "fla", "linear_cross_entropy": "liger_kernel"}
    assert found == pytest.approx(plain, rel=1e-4)
    with pytest.raises(
        ConfigError, match=r"differs from float32 by a relative 0\.05.*kernels.scan=auto"
    ):
        losses(engine_with(KernelsPlugin(scan="mamba_ssm")))
    assert losses(engine_with(KernelsPlugin(scan="mamba_ssm", tolerance=0.1))) > 0


def test_a_kernel_whose_gradient_alone_is_wrong_is_refused(shelf: Shelf) -> None:
    shelf.put("liger_kernel")
    module = importlib.import_module("liger_kernel.transformers.functional")
    right = module.liger_fused_linear_cross_entropy

    def blind(rows: Tensor, head: Tensor, *labels: Any, **settings: Any) -> Tensor:
        return right(rows, head.detach() + 0 * head, *labels, **settings)

    module.liger_fused_linear_cross_entropy = blind
    with pytest.warns(RuntimeWarning, match="differs from float32 by a relative 1 in gradient"):
        losses(engine_with(KernelsPlugin()))


def test_a_package_that_fails_is_said_and_not_used(shelf: Shelf) -> None:
    shelf.put("causal_conv1d")
    module = importlib.import_module("causal_conv1d")

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("Expected x.is_cuda() to be true, but got false.")

    module.causal_conv1d_fn = broken
    plugin = KernelsPlugin()
    with pytest.warns(RuntimeWarning, match=r"failed with RuntimeError: Expected x.is_cuda"):
        losses(engine_with(plugin))
    assert plugin.used == {}


def test_a_package_that_is_asked_for_and_missing_is_refused(shelf: Shelf) -> None:
    if "mamba_ssm" in available():
        pytest.skip("it is installed")
    with pytest.raises(ConfigError, match="kernels.scan is 'mamba_ssm', but that package is not"):
        losses(engine_with(KernelsPlugin(scan="mamba_ssm")))
    engine = engine_with(KernelsPlugin())
    assert engine.metrics.get("kernels/used", 0.0) == 0.0
    assert losses(engine) > 0


def test_a_resumed_run_is_told_of_another_kernel(shelf: Shelf) -> None:
    shelf.put("mamba_ssm", "fla")
    first = engine_with(KernelsPlugin())
    first.fit(until="2 steps")
    snapshot = copy.deepcopy(first.state_dict())
    same, other = engine_with(KernelsPlugin()), engine_with(KernelsPlugin(scan="fla"))
    same.load_state_dict(snapshot)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.fit(until="3 steps")
    other.load_state_dict(snapshot)
    with pytest.warns(RuntimeWarning, match="resuming: scan now runs on fla instead of mamba_ssm"):
        other.fit(until="3 steps")


def test_generation_is_left_alone(shelf: Shelf) -> None:
    """Generating one token at a time uses the layers' own step, not a kernel."""
    shelf.put(*PACKAGES)
    engine = engine_with(KernelsPlugin())
    losses(engine)
    assert isinstance(engine.model, NEXUSCore)
    assert engine.model.generate(torch.tensor([[1, 2]]), 3, temperature=0).shape == (1, 5)
