"""Two processes that each hold a shard of the model: the numbers of one process, or an error."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, Loss, LossConfig, Plugin, PluginConfig, hookimpl
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from tests.distributed.launcher import NEXUS_RUN, PATIENCE_S, start, write_run
from tests.distributed.processes import together
from tests.distributed.test_ddp import more
from tests.distributed.works import (
    CrossedNet,
    DeepNet,
    OpaqueNet,
    ReadNet,
    Seen,
    TableNet,
    build,
    command,
    refused,
    train_deep,
    train_with,
)
from tiny import Net, SquaredPlugin

REGISTERED = 1 if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 11) else 0
"""Backward hooks that PyTorch keeps on a weight that the model returns."""
ADAMW = partial(OptimAdamwPlugin, lr=1e-2, eps=1e-4)
HIDDEN = partial(FsdpPlugin, timeout=20, match=("hidden",))


def compare(seen: Seen, alone: Seen, rel: float = 1e-6) -> None:
    """Compare every logged number, step by step, including evaluations."""
    assert len(seen.logged) == len(alone.logged) > 0
    for own, expected in zip(seen.logged, alone.logged, strict=True):
        assert own == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize(
    ("accumulate", "settings"),
    [
        (2, {"reduce_at_end": True}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1, {}),
                (2, {}),
                (1, {"reshard": False}),
                (2, {"reshard": False, "reduce_at_end": True}),
                (2, {"match": ("head", "hidden"), "reduce_dtype": "fp32"}),
            )
        ),
    ],
    ids=str,
)
def test_two_processes_get_the_numbers_of_one(accumulate: int, settings: dict[str, Any]) -> None:
    """Fails if losses, weights, counters or evaluations depend on the sharding.

    Labels are ragged, 23 samples leave a last batch of 5, and 11 a last evaluation batch of 3.
    """
    plugin = partial(FsdpPlugin, timeout=20, **{"match": ("hidden",), **settings})
    work = partial(train_with, plugin, 50, optimizer=ADAMW, accumulate=accumulate, eval_every=20)
    alone, pair = work(), together(2, work)
    assert len(alone.losses) == 50
    for seen in pair:
        assert seen.losses == pytest.approx(alone.losses, rel=1e-6)
        assert [e["val/loss"] for e in seen.evaluations] == pytest.approx(
            [e["val/loss"] for e in alone.evaluations], rel=1e-6
        )
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)
        assert (seen.samples, seen.tokens) == (alone.samples, alone.tokens)
    for step, ids in enumerate(alone.ids):
        assert sorted(pair[0].ids[step] + pair[1].ids[step]) == sorted(ids)


@pytest.mark.parametrize("build_once", [True, *more(False)])
def test_a_model_is_the_same_to_the_bit_once_it_is_divided(build_once: bool) -> None:
    """Fails if initial weights, buffers or marks differ from one process, or training does.

    The model has nested lists, non-persistent buffers, tied, frozen and marked weights, and a
    scalar. Also fails if a process holds more than its shard, or if hooks on a weight that the
    model returns accumulate.
    """
    plugin = partial(FsdpPlugin, timeout=20, build_once=build_once, reshard=build_once)
    work = partial(train_deep, plugin, 8, accumulate=2)
    alone, pair = work(), together(2, work)
    assert {name for name, mark in alone.marks.items() if mark == (True, True)} == {"marked"}
    for seen in pair:
        assert seen.first == alone.first
        assert seen.marks == alone.marks
        compare(seen, alone)
        assert seen.last.keys() == alone.last.keys()
        for name, values in alone.last.items():
            assert seen.last[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
        assert max(seen.hooks) == REGISTERED
    for one, other, whole in zip(pair[0].shapes, pair[1].shapes, alone.shapes, strict=True):
        assert whole == () or (one[0] + other[0], *one[1:]) == whole


@pytest.mark.slow
def test_an_average_is_not_left_in_weights_that_stay_gathered() -> None:
    """Fails if training continues with weights gathered in an evaluation."""
    plugin = partial(FsdpPlugin, timeout=20, match=("hidden", "head"), reshard=False)
    work = partial(train_with, plugin, 12, EmaPlugin, optimizer=ADAMW, eval_every=3)
    alone = work()
    for seen in together(2, work):
        assert seen.losses == pytest.approx(alone.losses, rel=1e-6)
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reduce_dtype", [None, "fp32"])
def test_16_bits_are_those_of_the_computation_alone(reduce_dtype: str | None) -> None:
    """Fails if weights are stored in 16 bits, or 16-bit computation does not train."""
    plugin = partial(HIDDEN, compute_dtype="bf16", reduce_dtype=reduce_dtype)
    work = partial(train_with, plugin, 50, optimizer=ADAMW)
    alone = work()
    for seen in together(2, work):
        assert seen.losses != pytest.approx(alone.losses, rel=1e-6), "computes in 32 bits"
        assert seen.losses == pytest.approx(alone.losses, rel=0.1)
        assert torch.tensor(seen.weights).bfloat16().tolist() != seen.weights


class LatePlugin(Plugin[PluginConfig]):
    """Uses a scalar parameter from the fifth step on."""

    @hookimpl
    def on_batch(self, engine: Engine) -> None:
        cast(LateNet, engine.model).late = engine.state.step >= 4


class LateNet(Net):
    """Has a scalar parameter that no loss reaches at first."""

    late = False

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output * self.factor if self.late else output


@pytest.mark.slow
def test_a_number_that_is_reached_late_is_the_same_in_all() -> None:
    """Fails if processes diverge on a weight without a gradient in the first step."""
    work = partial(train_with, HIDDEN, 10, LatePlugin, net=LateNet, optimizer=ADAMW)
    alone = work()
    for seen in together(2, work):
        assert seen.losses == pytest.approx(alone.losses, rel=1e-5)
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)


class NarrowPlugin(Loss[LossConfig]):
    """Is 1 if the model's output would make a 16-bit loss."""

    def units(self, batch: dict[str, Tensor]) -> float:
        return 1.0

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return output.sum() * 0.0 + float(output.dtype != torch.float32)


def test_losses_of_a_model_in_16_bits_are_not_rounded_to_them() -> None:
    """Fails if logged losses only have three digits."""
    plugin = partial(HIDDEN, compute_dtype="bf16")
    for seen in together(2, partial(train_with, plugin, 2, NarrowPlugin, optimizer=ADAMW)):
        logged = [line["train/narrow_loss"] for line in seen.logged if "train/narrow_loss" in line]
        assert logged == [0.0, 0.0]


@pytest.mark.slow
def test_parts_and_single_numbers_go_together() -> None:
    """Fails if unsharded weights are scaled, averaged or rejected differently."""
    amp = partial(AmpPlugin, dtype="fp16", initial_scale=64.0)
    work = partial(train_deep, partial(FsdpPlugin, timeout=20), 8, amp, EmaPlugin, GuardPlugin)
    alone, pair = work(), together(2, work)
    assert alone.last["sharpness"] != alone.first["sharpness"]
    assert pair[0].last == pair[1].last
    for seen in pair:
        compare(seen, alone, rel=2e-2)
        assert seen.last["sharpness"] == pytest.approx(alone.last["sharpness"], rel=1e-3)


@pytest.mark.slow
def test_a_layer_that_no_loss_reaches_is_left_alone() -> None:
    """Fails if the gradient sum waits for one that never arrives, or invents one."""
    plugin = partial(FsdpPlugin, timeout=20, match=("hidden", "unreached"))
    work = partial(train_with, plugin, 6, optimizer=ADAMW, unreached=True)
    alone = work()
    for seen in together(2, work):
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_more_processes_than_rows_of_a_weight_train_as_one() -> None:
    """Fails if a process without a shard of a weight hangs (3 rows on 4 processes)."""
    work = partial(train_deep, partial(FsdpPlugin, timeout=30), 4)
    alone = work()
    for seen in together(4, work):
        compare(seen, alone)


def test_what_cannot_be_divided_is_refused_with_one_error() -> None:
    """Fails if a user's mistake ends in PyTorch's traceback, or trains something else."""
    tries = (
        partial(build, Net, program_optimizer=True),
        partial(build, Net, match=("*.nothing",)),
        partial(build, DeepNet, match=("blocks",)),
        partial(build, CrossedNet, match=("blocks.?", "tied")),
        partial(build, TableNet, program_model=False),
        partial(build, OpaqueNet),
    )
    expected = (
        "pass the Engine no optimizer",
        "fsdp.match: the pattern '*.nothing' matches no module",
        "fsdp.match: fully_shard does not support containers",
        "is tied to a weight gathered with another module",
        "fsdp.build_once: the tensor 'table' of the model itself",
        "fsdp finds no tensor in the model's output",
    )
    for errors in together(2, partial(refused, *tries)):
        for error, part in zip(errors, expected, strict=True):
            assert error.startswith("ConfigError: ")
            assert part in error


def test_a_model_that_must_read_its_weights_is_told_how_to_be_built() -> None:
    """Fails if a model that reads a weight while it is built ends in PyTorch's own error."""
    with pytest.raises(AssertionError, match="ConfigError: fsdp.build_once: .*build_once=false"):
        together(2, partial(build, ReadNet, program_model=False))
    together(2, partial(build, ReadNet, program_model=False, build_once=False))


def test_weights_on_the_host_are_not_moved_to_the_host() -> None:
    """Fails if a setting without effect on this device is silently accepted."""
    with pytest.raises(ConfigError, match="fsdp.offload: the weights are already in CPU memory"):
        Engine(Net(), plugins=[FsdpPlugin(offload=True), SquaredPlugin(), ADAMW()])


TINY_NEXUS = {
    "d_model": 16, "ssm_n_layers": 2, "ssm_head_dim": 16, "ssm_d_state": 8,
    "reason": True, "causal": True,
    "energy_threshold": 1e-30,  # a threshold on rounded values would be unstable
}  # fmt: skip


@pytest.mark.slow
def test_the_nexus_model_trains_under_the_launcher_as_alone(tmp_path: Path) -> None:
    """Fails if `nexus-run` with all five losses logs other numbers than alone or with ddp.

    With fsdp, a launcher starts it.
    """
    corpus = {"train": "corpus.txt", "seq_len": 32, "batch_size": 8, "valid_limit": 64}
    losses = {f"loss_{name}": {} for name in ("lm", "world", "reason", "energy", "causal")}
    plugins = {
        "data_text": corpus, "model_nexus": TINY_NEXUS, **losses,
        "optim_adamw": {"lr": 1e-3, "eps": 1e-4}, "guard": {}, "clip": {}, "jsonl": {},
        "console": {},
    }  # fmt: skip
    write_run(tmp_path, plugins=plugins, eval_every="10 steps")
    found = {}
    for name, processes in (("alone", 1), ("ddp", 2), ("fsdp", 2)):
        extra = ["--plugins", name] if processes > 1 else []
        options = ["tiny.yaml", "--out", name, *extra]
        if name == "fsdp":
            launcher = start(tmp_path, processes, *NEXUS_RUN, *options)
            output = launcher.communicate(timeout=PATIENCE_S)[0]
            assert launcher.returncode == 0, output
        else:
            output = "".join(together(processes, command, tmp_path, options))
        assert "warning" not in output
        assert ("sample" in output) == (name != "fsdp")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    assert len(found["alone"]) == 22
    for name, other, rel, rel_energy in (
        ("fsdp", "ddp", 1e-5, 1e-5),
        ("ddp", "alone", 3e-4, 5e-3),  # steep descent amplifies rounding
    ):
        for own, expected in zip(found[name], found[other], strict=True):
            assert own.keys() == expected.keys()
            for key in own.keys() - {"time", "seconds"}:
                near = pytest.approx(expected[key], rel=rel_energy if "energy" in key else rel)
                assert own[key] == near, (name, own["step"], key)
    assert all("train/energy_loss" in line for line in found["fsdp"] if "train/lm_loss" in line)
