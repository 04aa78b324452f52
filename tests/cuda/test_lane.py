"""Tests that need a CUDA device: `pytest -m cuda`.

`NEXUS_LANE_DEVICE=cpu pytest -m cuda` runs the same tests on the CPU, which only verifies the tests
themselves. Tests without a CPU counterpart are skipped there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from nexus_core import Engine, Plugin, PluginConfig, ResumableLoader, RunData, hookimpl
from nexus_core.cli.verify_resume import verify_resume
from nexus_core.plan import load
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.auto_accumulate import AutoAccumulatePlugin
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.compile import CompilePlugin
from nexus_plugins.curriculum import CurriculumPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.deterministic import DeterministicPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.lr_cosine import LrCosinePlugin
from nexus_plugins.model_nexus import ModelNexusPlugin
from nexus_plugins.offload import OffloadPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from nexus_plugins.optim_muon import OptimMuonPlugin
from nexus_plugins.throughput import ThroughputPlugin

pytestmark = pytest.mark.cuda

KIND = os.environ.get("NEXUS_LANE_DEVICE", "cuda")
LOSSES = ("loss_lm", "loss_world", "loss_reason", "loss_energy", "loss_causal")
VOCABULARY, LENGTH, ROWS = 64, 64, 8
MIB = 2**20


@pytest.fixture(scope="module")
def device() -> torch.device:
    """The device under test."""
    if KIND == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; NEXUS_LANE_DEVICE=cpu tries the tests on the CPU")
    return torch.device(KIND)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device if it is CUDA, for tests without a CPU counterpart."""
    if device.type != "cuda":
        pytest.skip(f"{device.type} has no counterpart of it")
    return device


class Tokens(Dataset[dict[str, Tensor]]):
    """Rows of ids, each determined by the two before it."""

    def __init__(self, rows: int = 64, length: int = LENGTH) -> None:
        ids = torch.randint(VOCABULARY, (rows, 2), generator=torch.Generator().manual_seed(3))
        for _ in range(length - 1):
            ids = torch.cat([ids, (ids[:, -1:] * 3 + ids[:, -2:-1]) % VOCABULARY], 1)
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index, :-1], "labels": self.ids[index, 1:]}


class RowsPlugin(Plugin[PluginConfig]):
    """Provides the rows in batches, page-locked or not."""

    def __init__(self, rows: int, pinned: bool) -> None:
        super().__init__()
        self._rows, self._pinned = rows, pinned

    @hookimpl
    def make_data(self) -> RunData:
        return RunData(ResumableLoader(Tokens(), self._rows, seed=5, pin_memory=self._pinned))


def engine_on(
    device: torch.device | str, *plugins: Plugin[Any], width: int = 64, dropout: float = 0.0,
    rows: int = ROWS, pinned: bool = False, out: Path | None = None, log_every: str = "1 steps",
    optimizer: Plugin[Any] | None = None, **settings: Any,
) -> Engine:  # fmt: skip
    """A small NEXUS with its losses; with dropout also the causal module, which draws noise.
    Without dropout nothing is drawn, so that the numbers of two devices can be compared.
    """
    draws = dropout > 0
    model = ModelNexusPlugin(
        vocab_size=VOCABULARY, d_model=width, ssm_n_layers=2, ssm_head_dim=32, dropout=dropout,
        reason=True, causal=draws,
    )  # fmt: skip
    losses = [load(name)() for name in LOSSES if draws or name != "loss_causal"]
    parts = [RowsPlugin(rows, pinned), model, *losses, optimizer or OptimAdamwPlugin(lr=3e-3)]
    return Engine(
        plugins=[*parts, *plugins], seed=1, device=device, out=out, log_every=log_every, **settings
    )


class LossesPlugin(Plugin[PluginConfig]):
    """Records the total loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    @hookimpl
    def on_log(self, metrics: dict[str, float]) -> None:
        self.seen.append(metrics["train/total_loss"])


def trained(
    device: torch.device | str, *plugins: Plugin[Any], steps: int = 8, **settings: Any
) -> tuple[list[float], Engine]:
    """The losses of some steps, and the engine after them."""
    losses = LossesPlugin()
    engine = engine_on(device, *plugins, losses, **settings)
    engine.fit(until=f"{steps} steps")
    return losses.seen, engine


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: value.cpu().clone() for name, value in engine.model.state_dict().items()}


# -- the numbers


@pytest.mark.parametrize(
    ("amp", "tolerance"),
    [(None, 2e-3), ("bf16", 5e-2), ("fp16", 2e-2)],
    ids=["fp32", "bf16", "fp16"],
)
def test_losses_are_those_of_the_cpu(
    device: torch.device, amp: str | None, tolerance: float
) -> None:
    """Eight steps of all five losses, without dropout, compared with the CPU in float32."""
    expected, _ = trained("cpu")
    plugins = [AmpPlugin(dtype=amp, initial_scale=256.0)] if amp == "fp16" else []
    plugins = [AmpPlugin(dtype=amp)] if amp == "bf16" else plugins
    found, engine = trained(device, *plugins)
    assert found == pytest.approx(expected, rel=tolerance)
    assert found[-1] < found[0]
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_an_overflow_of_fp16_is_skipped_and_the_scale_halved(device: torch.device) -> None:
    amp = AmpPlugin(dtype="fp16", initial_scale=2.0**100)
    _, engine = trained(device, amp, steps=4)
    assert engine.metrics["amp/skipped_steps"] >= 1
    assert engine.metrics["amp/scale"] < 2.0**100
    assert all(torch.isfinite(value).all() for value in weights(engine).values())


WITH: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("clip", "diagnose", "ema", "grad_stats", "guard", "pcgrad")},
    **{name: {} for name in ("throughput", "weigh_magnitude", "weigh_uncertainty")},
    "amp": {"dtype": "fp16"},
    "auto_accumulate": {"rows": 2},
    "curriculum": {"start_length": 16, "end_length": LENGTH, "warmup": "4 steps", "round_to": 16},
    "freeze": {"rules": [{"match": "embedding.*", "until": "2 steps"}]},
    "offload": {"without_cuda": "copy", "min_kib": 0},
    "recompute": {},
    "weigh_gradnorm": {"every": 2},
}


@pytest.mark.parametrize("name", WITH)
def test_a_resumed_run_ends_in_the_same_bits(name: str, device: torch.device) -> None:
    """A snapshot from the middle continues to the weights of an uninterrupted run."""

    def run(last: int, snapshot: Any = None) -> Engine:
        plugin = load(name)(**WITH[name])
        engine = engine_on(device, plugin, DeterministicPlugin(), dropout=0.1)
        if snapshot is not None:
            engine.load_state_dict(snapshot)
        for state in engine.steps(until="6 steps"):
            if state.step == last:
                break
        return engine

    whole, resumed = run(6), run(6, run(3).state_dict())
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key


# -- copies


class PinnedPlugin(Plugin[PluginConfig]):
    """Records whether batches are in page-locked memory, whose copies overlap with computation."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[bool] = []

    @hookimpl
    def on_batch(self, batch: dict[str, Tensor]) -> None:
        self.pinned.append(all(value.is_pinned() for value in batch.values()))


def test_pinned_batches_give_the_same_bits(device: torch.device) -> None:
    """Fails if a batch is used or overwritten before its copy to the device is complete."""
    found = []
    for pin in (False, True):
        notes = PinnedPlugin()
        pinned = pin and device.type == "cuda"
        engine = engine_on(device, notes, DeterministicPlugin(), pinned=pinned)
        engine.fit(until="10 steps")
        assert set(notes.pinned) == {pin and device.type == "cuda"}
        found.append(weights(engine))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_offloaded_activations_give_the_same_bits_in_less_memory(device: torch.device) -> None:
    def run(*plugins: Plugin[Any]) -> tuple[dict[str, Tensor], int]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        engine = engine_on(device, *plugins, DeterministicPlugin(), width=128, rows=64)
        engine.fit(until="3 steps")
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        return weights(engine), peak

    mover = OffloadPlugin(match=["blocks.*"], min_kib=64, without_cuda="copy")
    (plain, peak), (moved, less) = run(), run(mover)
    assert all(torch.equal(value, moved[name]) for name, value in plain.items())
    assert less < peak or device.type != "cuda"


class CopiesPlugin(Plugin[PluginConfig]):
    """Records the weights of every step, and the time spent after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.seconds: dict[int, float] = {}

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.kept[engine.state.step] = weights(engine)
        self._since = time.perf_counter()

    @hookimpl(stage="clock")
    def on_step_end(self, engine: Engine) -> None:
        self.seconds[engine.state.step] = time.perf_counter() - self._since


def test_a_checkpoint_holds_its_own_step_though_training_goes_on(
    device: torch.device, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Fails if a host copy is written to disk before it is complete, or after the next update."""
    stalls = {}
    for sync in (False, True):
        copies = CopiesPlugin()
        saver = CheckpointPlugin(every="2 steps", keep_last=9, sync=sync, best=None)
        engine = engine_on(device, saver, copies, width=256, out=tmp_path / str(sync))
        engine.fit(until="8 steps")
        stalls[sync] = max(copies.seconds[step] for step in (4, 6))  # the first allocates buffers
        for step in (2, 4, 6, 8):
            fresh = CheckpointPlugin(every="2 steps", keep_last=9, best=None)
            again = engine_on(device, fresh, CopiesPlugin(), width=256, out=tmp_path / str(sync))
            again.resume(str(tmp_path / str(sync) / f"checkpoints/step-{step:08d}"))
            for name, value in weights(again).items():
                assert torch.equal(value, copies.kept[step][name]), (step, name)
    record_property("stall of a save, ms, beside the loop and within it", [
        round(1000 * stalls[sync], 2) for sync in (False, True)
    ])  # fmt: skip


# -- memory


def test_a_batch_that_does_not_fit_is_split_and_gives_the_same_losses(device: torch.device) -> None:
    """On CUDA the whole batch really runs out of memory: only part of it fits the limit."""
    expected, _ = trained("cpu", steps=3)
    losses = LossesPlugin()
    if device.type == "cuda":
        probe = engine_on(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        probe.fit(until="1 step")
        needs = torch.cuda.max_memory_allocated() - before
        del probe
        torch.cuda.empty_cache()
        limit = (torch.cuda.memory_reserved() + needs * 0.75) / 2**30
        splitter = AutoAccumulatePlugin(limit=limit, margin=0.0)
    else:
        splitter = AutoAccumulatePlugin(rows=3)
    engine = engine_on(device, splitter, losses)
    engine.fit(until="3 steps")
    assert 1 <= engine.metrics["system/micro_batch_rows"] < ROWS
    assert losses.seen == pytest.approx(expected, rel=2e-3)


def test_throughput_tells_the_memory_of_the_device(cuda: torch.device) -> None:
    _, engine = trained(cuda, ThroughputPlugin(), steps=2)
    assert 0 < engine.metrics["system/gpu_memory"] < 4


# -- compiled


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_gives_the_losses_of_eager_code(mode: str, device: torch.device) -> None:
    """`reduce-overhead` runs forward and backward from CUDA graphs."""
    expected, _ = trained(device)
    backend = {} if device.type == "cuda" else {"backend": "aot_eager"}
    mode = mode if device.type == "cuda" else "default"
    found, engine = trained(device, CompilePlugin(mode=mode, **backend), AmpPlugin())
    eager, _ = trained(device, AmpPlugin())
    assert found == pytest.approx(eager, rel=2e-2)
    assert found == pytest.approx(expected, rel=5e-2)
    assert engine.metrics["compile/graphs"] > 0


def replayed(
    device: torch.device, *plugins: Plugin[Any], step_graph: bool = True, **settings: Any
) -> Engine:
    """All five losses, with dropout, in steps of two micro-batches, without code generation."""
    compiling = CompilePlugin(backend="eager", step_graph=step_graph)
    settings |= {"dropout": 0.1, "accumulate": 2, "rows": 4}
    pinned = device.type == "cuda"
    return engine_on(device, *plugins, compiling, pinned=pinned, **settings)


def steps_to(engine: Engine, last: int) -> Engine:
    with torch.compiler.set_stance("force_eager"):
        for state in engine.steps(until="100 steps"):
            if state.step == last:
                break
    return engine


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_steps_replayed_from_a_graph_have_the_losses_of_eager_ones(
    cuda: torch.device, dtype: str | None
) -> None:
    """The gradient of a step is one launch, and so is the update, without a sync."""
    ends = []
    for step_graph in (False, True):
        quiet = QuietPlugin(since=5)
        amp = [] if dtype is None else [AmpPlugin(dtype=dtype)]
        plugins = [*amp, ClipPlugin(), GuardPlugin(), EmaPlugin(), DeterministicPlugin(), quiet]
        engine = steps_to(replayed(cuda, *plugins, step_graph=step_graph), 10)
        assert quiet.quiet == 5
        names = [name for name in engine.metrics if name.startswith("train/")]
        ends.append(({name: engine.metrics[name] for name in names}, weights(engine)))
    assert engine.metrics["compile/replayed_steps"] >= 6
    assert engine.metrics["compile/replayed_updates"] >= 6
    (metrics, eager), (others, graph) = ends
    assert others == pytest.approx(metrics, rel=1e-2)
    for name, value in eager.items():
        torch.testing.assert_close(graph[name], value, rtol=0.05, atol=5e-3, msg=name)


@pytest.mark.parametrize("kind", [OptimAdamwPlugin, OptimMuonPlugin])
def test_a_run_resumed_among_replayed_steps_ends_in_the_same_bits(
    cuda: torch.device, kind: type[Plugin[Any]]
) -> None:
    """Its first steps are eager again: a replayed step is bitwise equal to an eager one."""

    def fresh() -> Engine:
        usual = ClipPlugin(), LrCosinePlugin(), GuardPlugin(), DeterministicPlugin()
        return replayed(cuda, *usual, optimizer=kind(lr=3e-3))

    whole = steps_to(fresh(), 10)
    snapshot = steps_to(fresh(), 6).state_dict()
    resumed = fresh()
    resumed.load_state_dict(snapshot)
    steps_to(resumed, 10)
    assert whole.metrics["compile/replayed_updates"] >= 6
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key


# -- resumed


def quickstart_on(device: torch.device, folder: Path) -> list[str]:
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    return [
        f"device={device.type}", f"data_text.train={corpus}", "data_text.seq_len=32",
        "data_text.batch_size=2", "model_nexus.d_model=16", "model_nexus.ssm_head_dim=16",
        "model_nexus.ssm_n_layers=1", "until=30 steps", "lr_cosine.warmup=2 steps",
        "checkpoint.every=5 steps",
    ]  # fmt: skip


def test_a_killed_run_ends_in_the_same_bits(device: torch.device, tmp_path: Path) -> None:
    """Real processes, killed by SIGKILL, with `deterministic`, which verify-resume adds."""
    sets = quickstart_on(device, tmp_path)
    report = verify_resume("quickstart", tmp_path / "out", kills=3, sets=sets, threads=1)
    assert report.differences == []
    assert report.kills == 3


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_two_deterministic_runs_are_the_same_to_the_bit(
    device: torch.device, dtype: str | None
) -> None:
    found = []
    for _ in range(2):
        amp = [AmpPlugin(dtype=dtype)] if dtype else []
        losses, engine = trained(device, DeterministicPlugin(), ClipPlugin(), *amp, dropout=0.1)
        found.append((losses, weights(engine)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


# -- no device syncs


class QuietPlugin(Plugin[PluginConfig]):
    """Makes every device sync an error, from the batch to the end of the update."""

    api_version = "1.2"

    def __init__(self, since: int = 3) -> None:
        super().__init__()
        self.since, self.quiet = since, 0

    @hookimpl(stage="inspect", trylast=True)
    def on_batch(self, engine: Engine) -> None:
        if engine.state.step >= self.since and engine.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    @hookimpl(stage="restore", trylast=True)
    def on_step(self, engine: Engine) -> None:
        if engine.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self.quiet += engine.state.step > self.since

    @hookimpl
    def on_close(self, engine: Engine) -> None:
        if engine.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(device: torch.device, dtype: str, tmp_path: Path) -> None:
    """The losses and plugins of the preset, with mixed precision, averages and a growing length."""
    quiet = QuietPlugin()
    plugins = [
        AmpPlugin(dtype=dtype), ClipPlugin(), GuardPlugin(), EmaPlugin(), LrCosinePlugin(),
        CurriculumPlugin(start_length=16, end_length=LENGTH, warmup="8 steps", round_to=16),
        CheckpointPlugin(every="100 steps", best=None, final=False), quiet,
    ]  # fmt: skip
    sizes: dict[str, Any] = {"rows": 4, "pinned": device.type == "cuda", "accumulate": 2}
    engine = engine_on(device, *plugins, out=tmp_path, log_every="1000 steps", **sizes)
    engine.fit(until="12 steps")
    assert quiet.quiet == 9


def test_a_wait_within_a_step_is_caught(cuda: torch.device) -> None:
    class NosyPlugin(Plugin[PluginConfig]):
        """Reads a number from the device at every step."""

        @hookimpl
        def after_backward(self, engine: Engine) -> None:
            next(iter(engine.model.parameters())).sum().item()

    with pytest.raises(RuntimeError, match="synchroniz"):
        engine_on(cuda, NosyPlugin(), QuietPlugin(), pinned=True, log_every="1000 steps").fit(
            until="6 steps"
        )


# -- several processes, with the device's backend


@contextmanager
def group_of_one(device: torch.device, folder: Path) -> Iterator[None]:
    """A process group of size one, with nccl on CUDA."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("made", [DdpPlugin, FsdpPlugin])
def test_a_group_of_one_trains_as_a_process_without_one(
    made: type[Plugin[Any]], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collectives of ddp and fsdp run on the backend; NCCL allows one process per device."""
    expected, plain = trained(device, steps=4)
    with group_of_one(device, tmp_path):
        total = torch.ones(3, device=device)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0, 1.0]
        if made is FsdpPlugin:
            monkeypatch.setattr("nexus_plugins.fsdp.plugin.launched", lambda: True)
        losses, engine = trained(device, made(), steps=4)
        if made is FsdpPlugin:
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(engine.model, FSDPModule)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert plain.state.step == engine.state.step == 4


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_devices_get_the_numbers_of_one(name: str, cuda: torch.device, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device, and NCCL takes one process a device")
    import json

    from tests.distributed.launcher import NEXUS_RUN, start, write_run

    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_run(folder, device="cuda")
        own = ["--plugins", "no:ddp,fsdp"] if name == "fsdp" else []
        launcher = start(folder, count, *NEXUS_RUN, "tiny.yaml", "--out", "run", *own)
        said, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, said
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]
        found[count] = [line["train/lm_loss"] for line in lines if "train/lm_loss" in line]
    assert found[2][:3] == pytest.approx(found[1][:3], rel=1e-2)


# -- third-party kernels


def test_installed_kernels_pass_their_check(cuda: torch.device) -> None:
    """Installed kernels are compared with float32 on the first batch, and used."""
    kernels = pytest.importorskip("nexus_plugins_contrib.kernels")
    if not kernels.available():
        pytest.skip("no package of kernels is installed")
    expected, _ = trained(cuda)
    found, engine = trained(cuda, kernels.KernelsPlugin())
    assert found == pytest.approx(expected, rel=2e-2)
    assert engine.metrics["kernels/used"] > 0
    assert isinstance(engine.model, nn.Module)
