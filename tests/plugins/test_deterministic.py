"""Deterministic runs: settings are restored, recorded and compared, and operations surveyed."""

from __future__ import annotations

import json
import os
import re
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, hookimpl
from nexus_core.cli.notes import companions
from nexus_core.errors import CheckpointError, DataError
from nexus_core.plan import installed, load
from nexus_core.testing import tiny_engine
from nexus_plugins._shared import running_sum as sums
from nexus_plugins._shared.numerics import WORKSPACE, numerics
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.deterministic import DeterministicPlugin
from nexus_plugins.loss_lm import LossLmPlugin

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs/plugins/deterministic.md"


class NoticePlugin(Plugin[PluginConfig]):
    """Records the numerics within a step, and may fail."""

    fails = False

    @hookimpl
    def on_step(self) -> None:
        self.seen = numerics(CPU)
        if self.fails:
            raise RuntimeError("index_hum_cuda does not have a deterministic implementation")


# -- the settings


@pytest.mark.parametrize("fails", [False, True])
def test_settings_act_within_the_run_and_are_given_back(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a setting is missing, or not restored when the run ends or fails."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, notice = numerics(CPU), NoticePlugin()
    notice.fails = fails
    engine = tiny_engine(DeterministicPlugin(), notice)
    assert numerics(CPU) == before, "nothing is set before the run"
    if fails:
        with pytest.raises(RuntimeError) as caught:
            engine.fit(until="1 step")
        assert any("deterministic.missing=warn" in n for n in caught.value.__notes__)
    else:
        engine.fit(until="2 steps")
    assert numerics(CPU) == before
    assert notice.seen == {
        "device": "cpu",
        "deterministic_algorithms": True,
        "cublas_workspace": ":4096:8",
        "cudnn_deterministic": True,
        "cudnn_benchmark": False,
        "cudnn_tf32": False,
        "float32_products": "highest",
        "float16_sums_in_16_bits": False,
        "bfloat16_sums_in_16_bits": False,
        "float16_products_in_16_bits": False,
    }


def test_an_operation_without_a_deterministic_form_is_refused_or_said() -> None:
    class MovesPlugin(Plugin[PluginConfig]):
        """Uses `put`, which has no deterministic order on any device."""

        @hookimpl
        def on_step(self) -> None:
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))

    with pytest.raises(RuntimeError, match="put_"):
        tiny_engine(DeterministicPlugin(), MovesPlugin()).fit(until="1 step")
    with pytest.warns(UserWarning, match="put_"):
        tiny_engine(DeterministicPlugin(missing="warn"), MovesPlugin()).fit(until="1 step")


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match=r"is ':0:0'.*unset it, or set it to :4096:8 or :16:8"):
        tiny_engine(DeterministicPlugin()).fit(until="1 step")
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(WORKSPACE, ":16:8")
    tiny_engine(DeterministicPlugin()).fit(until="1 step")
    assert os.environ[WORKSPACE] == ":16:8", "the user's own stays"


@pytest.mark.parametrize("first", [0, 1])
def test_runs_side_by_side_keep_the_settings_until_the_last_ends(first: int) -> None:
    """Fails if the first to end restores them too early, or the last not at all."""
    before = numerics(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loops = [tiny_engine(DeterministicPlugin()).steps(until="3 steps") for _ in range(2)]
        for loop in loops:
            next(loop)
        refused = tiny_engine(DeterministicPlugin(missing="warn"))
        with pytest.raises(ConfigError, match=r"missing is 'refuse' for another run.*needs 'warn'"):
            refused.fit(until="1 step")
        loops[first].close()
        assert numerics(CPU)["deterministic_algorithms"] is True
        loops[1 - first].close()
    assert numerics(CPU) == before


@pytest.mark.parametrize("when", ["before the run", "at its start"])
def test_tf32_is_refused_or_allowed_in_so_many_words(when: str) -> None:
    class RoughPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_start(self) -> None:
            torch.set_float32_matmul_precision("high")

    rough = [RoughPlugin] if when == "at its start" else []
    try:
        if not rough:
            torch.set_float32_matmul_precision("high")
        with pytest.raises(ConfigError, match="may be rounded to 'high'.*deterministic.tf32=true"):
            tiny_engine(DeterministicPlugin(), *(make() for make in rough)).fit(until="1 step")
        allowed = DeterministicPlugin(tf32=True)
        tiny_engine(allowed, *(make() for make in rough)).fit(until="1 step")
    finally:
        torch.set_float32_matmul_precision("highest")


# -- recorded and compared


def saving(folder: Path, policy: str = "exact", *others: Plugin[Any]) -> Engine:
    return tiny_engine(
        CheckpointPlugin(every="2 steps", sync=True, best=None, resume_policy=policy),
        *others,
        out=folder,
    )


def test_the_lock_records_how_a_run_was_computed_and_a_resume_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a resume silently computes with different numerics."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    saving(tmp_path, "exact", DeterministicPlugin()).fit(until="2 steps")
    lock = json.loads((tmp_path / "checkpoints/final/lock.json").read_text())
    assert lock["numerics"]["cublas_workspace"] == ":4096:8"
    assert lock["numerics"]["deterministic_algorithms"] is True
    same = saving(tmp_path, "exact", DeterministicPlugin())
    same.resume()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.fit(until="4 steps")
    monkeypatch.setenv(WORKSPACE, ":16:8")
    other = saving(tmp_path, "exact", DeterministicPlugin())
    other.resume()
    with pytest.raises(CheckpointError, match=r"cublas_workspace is :16:8, was :4096:8.*compatib"):
        other.fit(until="6 steps")
    free = saving(tmp_path, "compatible", DeterministicPlugin())
    free.resume()
    with pytest.warns(RuntimeWarning, match="resuming: cublas_workspace is :16:8, was :4096:8"):
        free.fit(until="6 steps")


def test_a_run_that_was_not_deterministic_is_told_of_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving(tmp_path).fit(until="2 steps")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    other = saving(tmp_path)
    other.resume()
    with pytest.warns(RuntimeWarning, match="resuming: cudnn_benchmark is True, was False"):
        other.fit(until="4 steps")


def test_verify_resume_makes_its_runs_deterministic() -> None:
    assert companions() == ["deterministic"]


# -- every operation that the trainer and its plugins use


DOCUMENTED: dict[str, tuple[str, ...]] = {
    "torch.nn.AvgPool3d": ("avg_pool3d_backward",),
    "torch.nn.AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward",),
    "torch.nn.AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward",),
    "torch.nn.AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool2d": ("fractional_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool3d": ("fractional_max_pool3d_backward",),
    "torch.nn.MaxPool3d": ("max_pool3d_with_indices_backward",),  # until PyTorch 2.12
    "torch.nn.MaxUnpool1d": ("max_unpool2d",),
    "torch.nn.MaxUnpool2d": ("max_unpool2d",),
    "torch.nn.MaxUnpool3d": ("max_unpool3d",),
    "torch.nn.functional.interpolate": tuple(
        f"upsample_{kind}_backward"
        for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    ),
    "torch.nn.ReflectionPad1d": ("reflection_pad1d_backward",),
    "torch.nn.ReflectionPad2d": ("reflection_pad2d_backward",),
    "torch.nn.ReflectionPad3d": ("reflection_pad3d_backward",),
    "torch.nn.NLLLoss": ("nll_loss_forward", "nll_loss2d_forward"),
    "torch.nn.CTCLoss": ("_ctc_loss_backward",),
    "torch.nn.EmbeddingBag": ("_embedding_bag_backward",),
    "torch.Tensor.put_": ("put_", "put"),
    "torch.histc": ("histc",),
    "torch.bincount": ("bincount",),
    "torch.median": ("median.dim",),
    "torch.nn.functional.grid_sample": ("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    "torch.cumsum": ("cumsum of floats",),
    "torch.Tensor.scatter_reduce": ("scatter_reduce",),
    "torch.Tensor.resize_": ("resize_ of quantized",),
}
"""PyTorch's list of nondeterministic operations, with the operators behind each name."""
UNDETERMINED = {operator: name for name, found in DOCUMENTED.items() for operator in found}


class Survey(TorchDispatchMode):
    """Records the operators dispatched in forward, backward and updates."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "cumsum" and first is not None and first.is_floating_point():
            name = "cumsum of floats"
        elif name == "median" and "dim" in func._overloadname:
            name = "median.dim"
        elif name == "resize_" and first is not None and first.is_quantized:
            name = "resize_ of quantized"
        self.operators.add(name)
        return func(*args, **(kwargs or {}))

    @property
    def undetermined(self) -> set[str]:
        """Those on PyTorch's list, by its names."""
        return {UNDETERMINED[name] for name in self.operators & UNDETERMINED.keys()}


def test_the_list_is_the_one_that_this_pytorch_documents() -> None:
    """Fails if PyTorch adds an operation: add the operators behind its name here."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    text = text.partition("operations will throw a")[2].partition("In addition")[0]
    named = re.findall(r"\* :(?:class|func):`([\w.]+)`", text)
    assert len(named) > 20
    assert set(named) <= DOCUMENTED.keys()


LENGTH = 16
BASIS: dict[str, dict[str, Any]] = {
    "data_text": {"seq_len": LENGTH, "batch_size": 2, "valid_limit": 2 * LENGTH},
    "model_nexus": {
        **{"d_model": 8, "ssm_n_layers": 1, "ssm_head_dim": 8, "ssm_expand": 1, "ssm_d_state": 4},
        "dropout": 0.1,
        "reason": True,
        "causal": True,
    },
    **{f"loss_{name}": {} for name in ("lm", "world", "reason", "energy", "causal")},
    "optim_adamw": {"lr": 1e-2},
}
PRESET = ("lr_cosine", "guard", "clip", "throughput", "checkpoint", "jsonl")
LIVELY: dict[str, dict[str, Any]] = {
    "auto_accumulate": {"rows": 1},
    "checkpoint": {"every": "2 steps", "sync": True},
    "curriculum": {"start_length": 4, "end_length": LENGTH, "warmup": "4 steps", "round_to": 4},
    "mfu": {"peak": 1e12},
    "offload": {"without_cuda": "copy", "min_kib": 0},
    "compile": {"backend": "eager"},
}
OF_A_USER = {"data", "init", "loss", "model"}  # these run user code
ALONE = sorted(
    name
    for name, entry in installed().items()
    if entry.dist
    and entry.dist.name == "nexus-trainer"
    and not entry.value.startswith("nexus_plugins_contrib.")
    and name not in OF_A_USER | BASIS.keys()
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(60)))
    return path


def surveyed(corpus: Path, out: Path, *names: str) -> tuple[Survey, dict[str, float]]:
    """Train the full model for two steps with some plugins; returns the dispatched operators."""
    wanted = list(names)
    for name in wanted:
        wanted += [n for n in load(name).requires if n not in wanted]
    slots = {load(name).slot for name in wanted} - {None}
    kept = [n for n in BASIS if load(n).slot not in slots]
    settings = {**BASIS, **LIVELY, "data_text": {**BASIS["data_text"], "train": str(corpus)}}
    plugins = [load(name)(**settings.get(name, {})) for name in dict.fromkeys((*kept, *wanted))]
    engine = Engine(plugins=plugins, seed=1, out=out, log_every=1, accumulate=2)
    with Survey() as survey:
        for _ in islice(engine.steps(until="9 steps", eval_every="2 steps"), 3):
            pass
    return survey, engine.result().metrics


def in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU behave like a device that sums floats in no fixed order."""
    monkeypatch.setattr(sums, "ADD_IN_ORDER", ())


def test_the_preset_asks_for_what_the_page_says_and_for_nothing_of_it_when_deterministic(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a nondeterministic operation is added, or its replacement removed."""
    free, losses = surveyed(corpus, tmp_path / "free", *PRESET)
    assert len(free.operators) > 80
    table = PAGE.read_text().partition("## Operations")[2]
    page = set(re.findall(r"^\| `(torch\.[\w.]+)`", table, re.MULTILINE))
    assert free.undetermined <= page <= DOCUMENTED.keys()
    assert "torch.cumsum" in free.undetermined, "the survey sees what it is to see"
    in_one_order(monkeypatch)
    kept, same = surveyed(corpus, tmp_path / "kept", "deterministic", *PRESET)
    assert kept.undetermined == set()
    for name in losses:
        if name.endswith("loss"):
            assert same[name] == pytest.approx(losses[name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_no_plugin_asks_for_what_has_no_deterministic_form(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_order(monkeypatch)
    try:
        survey, _ = surveyed(corpus, tmp_path, *{"deterministic": None, name: None})
    except (ConfigError, DataError) as error:  # it needs specific settings or data
        pytest.skip(str(error))
    assert survey.undetermined == set()


@given(st.integers(1, 70), st.integers(0, 2), st.integers(0, 2**31))
def test_sums_by_doubling_are_those_of_cumsum(length: int, dim: int, seed: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = length
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        in_one_order(patch)
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        found = sums.running_sum(values, dim)
    torch.testing.assert_close(found, values.double().cumsum(dim).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(sums.running_sum(values, dim), values.cumsum(dim))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_logits_is_the_same_without_its_kernel(smoothing: float) -> None:
    """Fails if the replacement of NLLLoss computes another loss or gradient."""
    labels = torch.tensor([[1, -100, 4], [0, 2, 2]])
    found = []
    for deterministic in (False, True):
        logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.use_deterministic_algorithms(deterministic)
        try:
            with Survey() as survey:
                loss = LossLmPlugin(label_smoothing=smoothing).loss({"labels": labels}, logits)
                loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert ("torch.nn.NLLLoss" in survey.undetermined) is not deterministic
        found.append((loss.detach(), logits.grad))
    torch.testing.assert_close(found[1], found[0])
