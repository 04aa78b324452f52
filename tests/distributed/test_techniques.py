"""Techniques in two processes: the numbers of one, whether the model is whole or sharded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_core import PluginError
from nexus_core.plan import arrange, load
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.compile import CompilePlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.lr_cosine import LrCosinePlugin
from nexus_plugins.lr_finder import LrFinderPlugin
from nexus_plugins.lr_wsd import LrWsdPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from nexus_plugins.optim_muon import OptimMuonPlugin
from nexus_plugins.recompute import RecomputePlugin
from nexus_plugins.schedule import SchedulePlugin
from nexus_plugins.weigh_gradnorm import WeighGradnormPlugin
from nexus_plugins.weigh_magnitude import WeighMagnitudePlugin
from nexus_plugins.weigh_uncertainty import WeighUncertaintyPlugin
from tests.distributed.processes import together
from tests.distributed.works import DamagePlugin, Seen, train_text, train_with

WAYS = {
    "ddp": partial(DdpPlugin, timeout=30),
    "fsdp": partial(FsdpPlugin, timeout=30, match=("hidden",)),
}
ADAMW = partial(OptimAdamwPlugin, lr=1e-2, eps=1e-4)
RULES = (
    {"target": "absolute.weight", "start": 0.1, "end": 0.5, "over": "10 steps"},
    {"target": "optimizer.weight_decay", "start": 0.1, "end": 0.5, "over": "10 steps"},
    {"target": "engine.accumulate", "start": 1, "end": 3, "over": "10 steps"},
)
EXACT: dict[str, tuple[Any, ...]] = {
    "clip": (partial(ClipPlugin, max_norm=0.1),),
    "clip, adaptively": (partial(ClipPlugin, by="agc", ratio=0.02),),
    "ema": (partial(EmaPlugin, decay=0.9, evaluate="both"),),
    "guard": (partial(GuardPlugin, spike_threshold=50.0),),
    "weigh_magnitude": (WeighMagnitudePlugin,),
    "weigh_uncertainty": (WeighUncertaintyPlugin,),
    "schedule": (partial(SchedulePlugin, rules=RULES),),
    "lr_wsd": (partial(LrWsdPlugin, warmup="3 steps"),),
    "lr_cosine": (partial(LrCosinePlugin, warmup="20 samples"),),
    "lr_finder": (partial(LrFinderPlugin, steps=10),),
    "recompute": (partial(RecomputePlugin, match=("hidden",)),),
    "compile": (partial(CompilePlugin, match=("hidden",), backend="aot_eager"),),
}
SLOW_TO_COMPILE: dict[str, tuple[Any, ...]] = {
    "whole": (partial(CompilePlugin, backend="aot_eager"),),
    "inductor": (partial(CompilePlugin, match=("hidden",)),),
    "all at once": (
        partial(AmpPlugin, dtype="bf16"),
        partial(RecomputePlugin, match=("hidden",)),
        partial(CompilePlugin, match=("hidden",), backend="aot_eager"),
        EmaPlugin, GuardPlugin, ClipPlugin,
    ),
}  # fmt: skip


def close(seen: Seen, alone: Seen, rel: float, ignored: str = "compile/") -> None:
    """Check that logs, evaluations and weights are equal."""
    for own, expected in (
        *zip(seen.logged, alone.logged, strict=True),
        *zip(seen.evaluations, alone.evaluations, strict=True),
    ):
        assert own.keys() == expected.keys()
        kept = [key for key in own if not key.startswith(ignored)]
        assert [own[k] for k in kept] == pytest.approx([expected[k] for k in kept], rel=rel)
    assert seen.weights == pytest.approx(alone.weights, rel=10 * rel, abs=10 * rel)
    assert len(alone.logged) > 0
    assert seen.samples == alone.samples


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    return WAYS[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_technique_gives_the_numbers_of_one_process(name: str, way: Any) -> None:
    """Fails if a share of a gradient, loss or weight is mistaken for the whole."""
    gradient = () if name.startswith("clip") else (partial(ClipPlugin, max_norm=1e9),)
    work = partial(
        train_with, way, 12, *EXACT[name], *gradient, optimizer=ADAMW, eval_every=5
    )  # fmt: skip
    alone = work()
    for seen in together(2, work):
        close(seen, alone, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TO_COMPILE)
def test_compiled_code_and_what_goes_with_it(name: str, way: Any) -> None:
    """Fails if compiled code runs with ungathered weights, or bypasses the gradient exchange."""
    gradient = () if name == "all at once" else (partial(ClipPlugin, max_norm=1e9),)
    work = partial(train_with, way, 8, *SLOW_TO_COMPILE[name], *gradient, optimizer=ADAMW)
    alone = work()
    for seen in together(2, work):
        close(seen, alone, rel=1e-2 if name == "all at once" else 1e-5)


@pytest.mark.slow
def test_gradients_of_terms_are_balanced_as_in_one_process() -> None:
    """Fails if a term's gradient norm is computed from shares, which overestimates it."""
    gradnorm = partial(WeighGradnormPlugin, every=2)
    work = partial(train_with, WAYS["ddp"], 12, gradnorm, optimizer=ADAMW, accumulate=2)
    alone = work()
    assert alone.logged[-1]["weight/squared"] != alone.logged[0]["weight/squared"]
    for seen in together(2, work):
        close(seen, alone, rel=1e-5)


@pytest.mark.slow
def test_16_bits_round_and_do_no_more(way: Any) -> None:
    """Fails if autocast is off in a process, or gradients differ by more than rounding."""
    work = partial(train_with, way, 12, AmpPlugin, ClipPlugin, optimizer=ADAMW, eval_every=5)
    alone = work()
    exact = train_with(way, 12, ClipPlugin, optimizer=ADAMW)
    assert alone.losses != pytest.approx(exact.losses, rel=1e-5)
    for seen in together(2, work):
        close(seen, alone, rel=5e-3)


@pytest.mark.slow
def test_all_skip_the_step_in_which_one_overflows(way: Any) -> None:
    """Fails if processes diverge when fp16 overflows in only one of them.

    The loss of step 4 is a million times larger in one process. It is finite, but its fp16 gradient
    is not.
    """
    amp = partial(AmpPlugin, dtype="fp16", initial_scale=64.0, growth_interval=100)
    alone = train_with(way, 8, amp, partial(DamagePlugin, 4, (0,), loss=1e6), optimizer=ADAMW)
    assert [line["amp/skipped_steps"] for line in alone.logged] == [0, 0, 0, 1, 1, 1, 1, 1]
    damage = partial(DamagePlugin, 4, (1,), loss=1e6)
    pair = together(2, partial(train_with, way, 8, amp, damage, optimizer=ADAMW))
    assert pair[0].weights == pair[1].weights
    for seen in pair:
        for key in ("amp/skipped_steps", "amp/scale"):
            assert [line[key] for line in seen.logged] == [line[key] for line in alone.logged]
        assert seen.weights == pytest.approx(alone.weights, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "damage",
    [{"grad": float("nan")}, pytest.param({"loss": float("nan")}, marks=pytest.mark.slow)],
    ids=["gradient", "loss"],
)
def test_all_refuse_the_step_that_one_cannot_trust(name: str, damage: dict[str, float]) -> None:
    """Fails if the others train on a NaN that one process sees, or wait for it.

    Also fails if the report only covers one process, or is printed by each.
    """
    run = partial(train_with, WAYS[name], 8, GuardPlugin, optimizer=ADAMW)
    alone = run(partial(DamagePlugin, 4, (0,), **damage))
    pair = together(2, partial(run, partial(DamagePlugin, 4, (1,), **damage)))
    assert pair[0].weights == pair[1].weights
    for seen in pair:
        skipped = [line["guard/skipped_steps"] for line in seen.logged]
        assert skipped == [0, 0, 0, 1, 1, 1, 1, 1]
        assert seen.weights == pytest.approx(alone.weights, rel=1e-5, abs=1e-6)
        assert torch.tensor(seen.weights).isfinite().all()
    assert pair[0].warnings == alone.warnings
    assert pair[1].warnings == []


@pytest.mark.slow
def test_all_go_back_to_where_they_had_saved(way: Any, tmp_path: Path) -> None:
    """Fails if a process restores weights other than its shard, or rolls back alone."""
    guard = partial(GuardPlugin, policy="rollback")
    run = partial(train_with, way, 8, guard, optimizer=ADAMW, every=2)
    alone = run(partial(DamagePlugin, 4, (0,), grad=float("nan")), out=tmp_path / "alone")
    assert alone.logged[-1]["guard/rollbacks"] == 1
    damage = partial(DamagePlugin, 4, (1,), grad=float("nan"))
    for seen in together(2, partial(run, damage, out=tmp_path / "pair")):
        close(seen, alone, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rel"), [("ddp", 1e-6), ("fsdp", 3e-3)])
@pytest.mark.parametrize("processes", [2, 3])
def test_muon_rounds_in_16_bits_and_does_no_more(name: str, rel: float, processes: int) -> None:
    """Fails if shards of a matrix are orthogonalized separately.

    Its matmuls are in bfloat16, and sums over a sharded matrix have another order.
    """
    muon = partial(OptimMuonPlugin, lr=1e-2, eps=1e-4)
    work = partial(train_with, WAYS[name], 12, ClipPlugin, optimizer=muon, eval_every=5)
    alone = work()
    for seen in together(processes, work):
        close(seen, alone, rel=rel)


@pytest.mark.slow
def test_a_curriculum_counts_the_rows_that_it_makes(way: Any, tmp_path: Path) -> None:
    """Fails if cut rows count differently in two processes, or are only cut in one."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    growth = {"start_length": 8, "end_length": 32, "round_to": 8, "warmup": "5 steps"}
    work = partial(
        train_text, partial(way.func, timeout=30), corpus, 10, curriculum=growth, clip={}
    )
    alone = together(1, work)[0]
    assert alone.samples > 80
    for seen in together(2, work):
        assert (seen.samples, seen.tokens) == (alone.samples, alone.tokens)
        for own, expected in zip(seen.logged, alone.logged, strict=True):
            assert own == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(FsdpPlugin.conflicts) - {"optim_adamw8bit"}))
def test_what_needs_whole_weights_or_gradients_is_refused(name: str) -> None:
    """Fails if such a run starts, and ends in a PyTorch error or wrong numbers."""
    plugins = [load(needed)() for needed in (name, *load(name).requires)]
    with pytest.raises(PluginError, match=f"fsdp.*{name}|{name}.*fsdp"):
        arrange([*plugins, FsdpPlugin()])
