"""Optimizers across a resume: their own state, this run's settings, and no crashes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.mutations import resign
from nexus_core import CheckpointError, Engine
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.optim_muon import MuonAndAdamw

ROOT = Path(__file__).parents[2]
Build = Callable[[nn.Module], Optimizer]


class Three(nn.Module):
    """Two linear layers of equal shape, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(10 * self.a(x))))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batches(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(8, *(shape or (4,)), generator=generator) for _ in range(5)]


def engine_in(out: Path, build: Build, model: nn.Module | None = None, **settings: Any) -> Engine:
    torch.manual_seed(0)
    model = model if model is not None else Three()
    plugin = CheckpointPlugin(every="1000 steps", **settings)
    return Engine(model, build(model), loss=loss, plugins=[plugin], out=out, seed=0)


def resumed(out: Path, build: Build, **settings: Any) -> Engine:
    engine = engine_in(out, build, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.resume()
    return engine


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def adamw(model: nn.Module, **settings: Any) -> Optimizer:
    return AdamW(model.parameters(), **{"lr": 1e-2, **settings})


def swapped(model: Any) -> Optimizer:
    return AdamW([*model.b.parameters(), *model.a.parameters(), *model.head.parameters()])


def grouped(model: Any) -> Optimizer:
    return AdamW([{"params": [p]} for p in model.parameters()])


@pytest.mark.parametrize(
    ("build", "fault"),
    [
        (lambda m: SGD(m.parameters(), 1e-2, momentum=0.9), "is torch.SGD, was torch.AdamW"),
        (lambda m: Adam(m.parameters(), amsgrad=True), "is torch.Adam, was torch.AdamW"),
        (swapped, "parameter 0 of the optimizer is b.weight, was a.weight"),
        (grouped, r"has groups of \[1, 1, 1, 1\] parameters, had \[4\]"),
        (lambda m: AdamW(m.head.parameters()), "parameter 0 of the optimizer is head.weight, was"),
    ],
)
def test_another_optimizer_is_refused_or_begins_anew(
    build: Build, fault: str, tmp_path: Path
) -> None:
    """Fails if moments are assigned to another parameter, or used by another optimizer class."""
    engine_in(tmp_path, adamw).fit(batches(), until=3)
    with pytest.raises(CheckpointError, match=fault) as refused:
        engine_in(tmp_path, build).resume()
    assert "resume_policy='force'" in str(refused.value)
    engine = engine_in(tmp_path, build, resume_policy="force")
    with pytest.warns(RuntimeWarning, match=f"{fault}.*starts with a fresh state"):
        engine.resume()
    engine.fit(batches(), until=5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 1e-4}, "lr is 0.0001, was 0.01"),
        ({"weight_decay": 0.5}, "weight_decay is 0.5, was 0.01"),
        ({"betas": (0.5, 0.9)}, r"betas is \(0.5, 0.9\), was \(0.9, 0.999\)"),
        ({"eps": 1e-3}, "eps is 0.001"),
        ({"lr": torch.tensor(0.5)}, "lr is 0.5, was 0.01"),
    ],
)
def test_settings_that_were_changed_act_and_are_said(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Fails if a run keeps the settings of the previous run, as optimizers do by default."""
    engine_in(tmp_path, adamw).fit(batches(), until=3)
    engine = engine_in(tmp_path, lambda m: adamw(m, **settings))
    with pytest.warns(RuntimeWarning, match=words):
        engine.resume()
    engine.fit(batches(), until=4)
    group = engine.optimizer.param_groups[0]
    for key, value in settings.items():
        assert group[key] == value
    again = resumed(tmp_path, lambda m: adamw(m, **settings))  # and stay, without a report
    assert all(again.optimizer.param_groups[0][key] == value for key, value in settings.items())


def test_settings_that_moved_in_training_stay_where_they_were(tmp_path: Path) -> None:
    """Fails if resuming with the same config resets what a schedule or user has changed."""
    engine = engine_in(tmp_path, adamw)
    for _ in engine.steps(batches(), until=3):
        engine.optimizer.param_groups[0]["weight_decay"] = 0.25
    assert resumed(tmp_path, adamw).optimizer.param_groups[0]["weight_decay"] == 0.25


def muon(model: Any) -> Optimizer:
    matrices = [{"params": [model.a.weight, model.b.weight]}]
    return MuonAndAdamw(torch.optim.Muon(matrices), AdamW(model.head.parameters(), fused=True))


def by_name(name: str, model: nn.Module) -> Optimizer:
    made: Optimizer = getattr(torch.optim, name)(model.parameters())
    return made


KINDS: dict[str, Build] = {
    "adamw": adamw, "fused": lambda m: adamw(m, fused=True), "muon": muon,
    "amsgrad": lambda m: adamw(m, amsgrad=True, foreach=False),
    "momentum": lambda m: SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, fused=True),
    "tensor lr": lambda m: adamw(m, lr=torch.tensor(1e-2)),
    "centered": lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, momentum=0.5, centered=True),
    **{
        name: partial(by_name, name)
        for name in ("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam",
                     "RMSprop", "Rprop", "SGD")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_of_torch_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    """Fails if an optimizer's own state is rejected or changed."""
    build = KINDS[kind]
    whole = engine_in(tmp_path / "whole", build)
    whole.fit(batches(), until=7)
    engine_in(tmp_path / "cut", build).fit(batches(), until=3)
    cut = resumed(tmp_path / "cut", build)
    cut.fit(batches(), until=7)
    for mine, other in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_moments_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    """Fails if a fused kernel pairs elements of a parameter with the wrong moments."""

    def run(out: Path, until: int, *, resume: bool = False) -> Engine:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        engine = engine_in(out, lambda m: adamw(m, fused=True), model)
        if resume:
            engine.resume()
        engine.fit(batches(3, 5, 5), until=until)
        return engine

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "cut", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = run(tmp_path / "cut", 6, resume=True)
    assert torch.equal(whole.model.weight, cut.model.weight)  # type: ignore[arg-type]


def forged(out: Path, build: Build, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint with a changed optimizer state and matching hashes."""
    engine_in(out / "run", build).fit(batches(), until=3)
    folder = (out / "run" / "checkpoints" / "final").resolve()
    state = json.loads((folder / "state.json").read_text())
    edit(state["optimizer"])
    (folder / "state.json").write_text(json.dumps(state))
    resign(folder)
    return folder


def of_first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda optimizer: optimizer["state"]["$dict"][0][1].update(changes)


def setting(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda optimizer: optimizer["param_groups"][0].update(changes)


NAN, BIAS = {"$float": "nan"}, {"$tensor": "state.3.exp_avg"}


@pytest.mark.parametrize("kind", ["fused", "adamw"])
@pytest.mark.parametrize(
    "edit",
    [
        of_first(exp_avg=BIAS),
        of_first(exp_avg_sq={"$tensor": "state.2.step"}),
        of_first(exp_avg_sq=None),
        of_first(exp_avg="abc"),
        of_first(step=BIAS),
        of_first(step=-1),
        of_first(step=None),
        of_first(step=NAN),
        of_first(step="3"),
        lambda o: o["state"]["$dict"][0][1].pop("step"),
        lambda o: o["state"]["$dict"][0][1].pop("exp_avg"),
        lambda o: o["state"]["$dict"].__setitem__(0, [0, 5]),
        lambda o: o["param_groups"][0].update(params=[0, 0, 1, 2]),
        setting(lr=NAN),
        setting(lr=-1.0),
        setting(lr="fast"),
        setting(betas={"$tuple": [-0.1, 0.9]}),
        setting(betas={"$tuple": [0.9]}),
        setting(betas=0.9),
        setting(eps=None),
        setting(weight_decay={"$float": "inf"}),
        setting(amsgrad=True),
        setting(amsgrad="yes"),
        setting(maximize=1.5),
        setting(initial_lr=NAN),
    ],
)
def test_a_forged_state_never_reaches_a_step(
    edit: Callable[[dict[str, Any]], object], kind: str, tmp_path: Path
) -> None:
    """Fails if a fused kernel reads out of bounds, or a step fails far from the cause."""
    folder = forged(tmp_path, KINDS[kind], edit)
    with pytest.raises(CheckpointError, match="optimizer"):
        engine_in(tmp_path / "new", KINDS[kind]).resume(str(folder))


@pytest.mark.parametrize(
    "edit",
    [setting(fused=True), setting(foreach=True), setting(new=[1, 2]), of_first(new=BIAS),
     lambda o: o["param_groups"][0].pop("eps"), lambda o: o["state"]["$dict"].pop(0)],
)  # fmt: skip
def test_what_a_forged_state_may_say_changes_nothing_that_this_run_decides(
    edit: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    """Fails if a checkpoint decides which kernel runs, or a setting is missing in the step."""
    folder = forged(tmp_path, adamw, edit)
    engine = engine_in(tmp_path / "new", adamw)
    engine.resume(str(folder))
    engine.fit(batches(), until=4)
    group = engine.optimizer.param_groups[0]
    assert (group["fused"], group["foreach"], group["eps"]) == (None, None, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64])
def test_a_count_of_another_dtype_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Fails if the check fails because PyTorch cannot compute in a dtype."""
    folder = forged(tmp_path, adamw, of_first())
    path = folder / "optimizer.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({**tensors, "state.0.step": torch.tensor(3.0).to(dtype)}, path)
    resign(folder)
    with pytest.raises(CheckpointError, match="parameter 0"):
        engine_in(tmp_path / "new", adamw).resume(str(folder))


def test_fused_sgd_goes_on_where_a_parameter_had_no_momentum_yet(tmp_path: Path) -> None:
    """Fails if the fused kernel gets momentum for only some parameters."""
    folder = forged(tmp_path, KINDS["momentum"], lambda o: o["state"]["$dict"].pop(0))
    engine = engine_in(tmp_path / "new", KINDS["momentum"])
    engine.resume(str(folder))
    engine.fit(batches(), until=4)


@pytest.mark.slow
def test_signed_mutations_are_refused_or_train() -> None:
    """Fails if one ends in anything but a `CheckpointError` or a step."""
    count = 200
    command = ["-m", "benchmarks.mutations", "--mutations", str(count), "--seed", "7"]
    done = subprocess.run(  # it forks, which is unsafe after using an accelerator
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) refused, (\d+) trained on, 0 failed", done.stdout)
    assert found is not None
    refused, worked = map(int, found.groups())
    assert refused + worked == count
    assert refused > count / 3
