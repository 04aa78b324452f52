"""Every plugin, preset and pair of plugins trains on an accelerator, with the numbers of the CPU.

The accelerator is simulated in host memory. The contract checks that each plugin resumes bitwise
and does not sync there (`runs_on_an_accelerator`, `device_is_not_waited_for`); these tests check
combinations.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nexus_core import Engine, Plugin
from nexus_core.plan import installed, load
from nexus_core.testing import HostAccelerator, Parts, host_accelerator, tiny_engine, tiny_model
from nexus_core.testing.states import differences, of_training
from tests.plugins.covering import covering

SMALL: dict[str, Any] = {
    "d_model": 8, "ssm_n_layers": 1, "ssm_head_dim": 8, "ssm_expand": 1, "ssm_d_state": 4,
    "d_latent": 4, "n_rules": 2, "reasoning_steps": 1,
    "d_code": 4, "n_memories": 2, "max_energy_iters": 2, "n_variables": 2,
}  # fmt: skip
ALL_LAYERS: dict[str, Any] = {
    "ssm_n_layers": 4, "layers": ("ssm", "delta", "window", "mlp"), "window": 8,
    "ngrams": (2,), "ngram_buckets": 64, "recall": (2,),
}  # fmt: skip
LOSSES = ("loss_lm", "loss_world", "loss_reason", "loss_energy", "loss_causal")
OF_THIS_MACHINE = ("system/", "compile/")
COMPANY: dict[str, dict[str, Any]] = {
    "optim_adamw": {"lr": 1e-2},
    "lr_cosine": {"warmup": "2 steps"},
    "amp": {},
    "clip": {"max_norm": 0.1},
    "guard": {"spike_threshold": 100.0},
    "ema": {},
    "curriculum": {"start_length": 4, "end_length": 16, "warmup": "4 steps", "round_to": 4},
    "checkpoint": {"every": "3 steps"},
    "throughput": {},
    "console": {},
    "jsonl": {},
    "tensorboard": {},
}
"""The presets' plugins besides data, model and losses, and others for long training."""


@pytest.fixture
def accelerator() -> Iterator[HostAccelerator]:
    with host_accelerator() as found:
        yield found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(60)))
    return path


def whole_nexus(
    corpus: Path, out: Path, device: torch.device | str, dropout: float = 0.1, **replaced: Any
) -> Engine:
    """All modules and losses with all these plugins; None instead of settings removes a plugin."""
    text = {"train": str(corpus), "cache_dir": str(corpus.parent / "cache")}
    wanted: dict[str, dict[str, Any] | None] = {
        "data_text": {**text, "seq_len": 16, "batch_size": 2, "valid_limit": 32},
        "model_nexus": {
            **SMALL,
            "dropout": dropout,
            "reason": True,
            "causal": "loss_causal" not in replaced,
        },
        **{name: {} for name in LOSSES},
        **COMPANY,
        **replaced,
    }
    plugins = [load(name)(**settings) for name, settings in wanted.items() if settings is not None]
    return Engine(plugins=plugins, seed=1, device=device, out=out, log_every=100, accumulate=2)


def run(engine: Engine, until: int, **more: Any) -> Iterator[int]:
    """Train up to a step, far from the horizon of the schedules."""
    with closing(engine.steps(until="1000 steps", **more)) as loop:
        for state in loop:
            yield state.step
            if state.step == until:
                return


@pytest.mark.parametrize("preset", ["nexus", "quickstart", "nexus_classic", "quickstart_classic"])
def test_all_of_each_preset_is_tried(preset: str) -> None:
    """Fails if a preset gets a plugin that the runs below do not have."""
    text = files("nexus_plugins.presets").joinpath(f"{preset}.yaml").read_text()
    tried = {"data_text", "model_nexus", "optim_muon", *LOSSES, *COMPANY}
    assert yaml.safe_load(text)["plugins"].keys() <= tried


@pytest.mark.slow
def test_the_whole_nexus_waits_for_nothing_in_a_step(
    accelerator: HostAccelerator, corpus: Path, tmp_path: Path
) -> None:
    """Fails if anything syncs in a step, or copies to the device what can be created there.

    In a step with a save, only the counts in the checkpoint are read.
    """
    sizes = {**SMALL, **ALL_LAYERS, "dropout": 0.1, "reason": True, "causal": True}
    optimizer = {"optim_adamw": None, "optim_muon": {}}  # AdamW is a part of it
    engine = whole_nexus(corpus, tmp_path, accelerator.device, model_nexus=sizes, **optimizer)
    waits: dict[int, list[str]] = {}
    for step in run(engine, 4, eval_data={}):
        waits[step] = [Path(wait.file).name for wait in accelerator.waits]
        accelerator.waits.clear()
    assert (waits[2], waits[4]) == ([], [])
    assert {*waits[3]} == {"plugin.py", "meter.py"}


@pytest.mark.slow
def test_the_whole_nexus_has_the_numbers_of_the_cpu(
    accelerator: HostAccelerator, corpus: Path, tmp_path: Path
) -> None:
    """Fails if a mask or index differs on a device; without random draws."""
    ends = []
    for device in ("cpu", accelerator.device):
        still: dict[str, Any] = {"dropout": 0.0, "loss_causal": None, "amp": None}
        engine = whole_nexus(corpus, tmp_path / torch.device(device).type, device, **still)
        list(run(engine, 3, eval_every="2 steps"))
        ends.append(engine.state_dict())
    one, other = ends
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name].cpu(), weight, rtol=1e-3, atol=1e-4)
    own = {k: v for k, v in one["metrics"].items() if not k.startswith(OF_THIS_MACHINE)}
    assert own == pytest.approx({k: other["metrics"][k] for k in own}, rel=1e-3)


@pytest.mark.slow
def test_the_whole_nexus_resumes_to_the_same_bits(
    accelerator: HostAccelerator, corpus: Path, tmp_path: Path
) -> None:
    """Fails if device state is lost, or read before its copy has completed.

    The fifth step is replayed from graphs in the uninterrupted run, but not in the resumed one. If
    it could not be replayed, the warning would be an error here.
    """
    replayed: dict[str, Any] = {"compile": {"backend": "eager", "step_graph": True}}
    with torch.compiler.set_stance("force_eager"):
        whole = whole_nexus(corpus, tmp_path, accelerator.device, curriculum=None, **replayed)
        compiling: Any = whole.plugins["compile"]
        counts = [compiling.collect_metrics() for _ in run(whole, 5)]
        assert counts[-1]["compile/replayed_updates"] == 1
        again = whole_nexus(corpus, tmp_path, accelerator.device, curriculum=None, **replayed)
        torch.rand(17, device=accelerator.device)
        again.resume()
        assert list(run(again, 5)) == [4, 5]
    assert differences(of_training(whole.state_dict()), of_training(again.state_dict())) == []


# -- pairs, on the smallest model

LEFT_OUT = {
    *(
        "data",
        "init",
        "loss",
        "loss_distill",
        "loss_dpo",
        "model",
    ),  # they depend on user code and files
    *("data_text", "model_nexus", *LOSSES),  # tested above, as they need one another
    "worth",  # it needs a model of modules; its contract has one
    *("compile", "ddp", "fsdp"),  # compiled code, and several processes
}
PAIRED = sorted(
    name
    for name, entry in installed().items()
    if entry.value.startswith("nexus_plugins.") and name not in LEFT_OUT
)
LIVELY: dict[str, dict[str, Any]] = {  # whose defaults would have no effect in so short a run
    "auto_accumulate": {"rows": 2},
    "checkpoint": {"every": "2 steps", "sync": True, "best": None},
    "clip": {"max_norm": 0.1},
    "curriculum": {"start_length": 2, "end_length": 8, "warmup": "4 steps", "round_to": 2},
    "freeze": {"rules": [{"match": "embedding.*"}]},
    "mfu": {"peak": 1e12},
    "offload": {"without_cuda": "copy", "min_kib": 0},
    "schedule": {
        "rules": [{"target": "tiny_next.weight", "start": 0.5, "end": 1.0, "over": "4 steps"}]
    },
}  # fmt: skip
ROUNDED = {"amp": 5e-2}
"""Tolerances for plugins whose results differ from the CPU: each device rounds other operations to
bfloat16. All other kernels are the same, except for the order of sums over tensors."""


def made(name: str) -> Plugin[Any]:
    schema = load(name).config_class.model_json_schema()
    return load(name)(**{**schema.get("examples", [{}])[0], **LIVELY.get(name, {})})


def are_enemies(one: Plugin[Any], other: Plugin[Any]) -> bool:
    shared = one.slot is not None and one.slot == other.slot
    return shared or other.name in one.conflicts or one.name in other.conflicts


def outcome(names: frozenset[str], device: torch.device | str, out: Path) -> dict[str, float] | str:
    """The metrics of two steps and an evaluation, or the error; with what the plugins require."""
    parts = Parts(model=lambda: tiny_model(dropout=0.0))
    try:
        required = {other for name in names for other in load(name).requires}
        plugins = [made(name) for name in sorted({*names, *required})]
        engine = tiny_engine(*plugins, parts=parts, device=device, out=out, log_every=1)
        list(run(engine, 2, eval_every="2 steps"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {k: v for k, v in engine.metrics.items() if not k.startswith(OF_THIS_MACHINE)}


def apart(expected: dict[str, float] | str, found: dict[str, float], near: float) -> str:
    """The metrics that differ from the CPU's."""
    if isinstance(expected, str):
        return f"the CPU refuses: {expected}"
    if expected.keys() != found.keys():
        return f"other metrics: {expected.keys() ^ found.keys()}"
    close = pytest.approx(expected, rel=near, abs=near, nan_ok=True)
    if found == close:
        return ""
    return ", ".join(f"{k} {v} and {found[k]}" for k, v in expected.items() if found[k] != v)


def fault(names: frozenset[str], accelerator: HostAccelerator, out: Path) -> str:
    """In what the plugins together differ from the CPU, which must not refuse them."""
    expected, found = (
        outcome(names, device, out / f"{'-'.join(sorted(names))} on {torch.device(device).type}")
        for device in ("cpu", accelerator.device)
    )
    near = max(ROUNDED.get(name, 1e-4) for name in names)
    return found if isinstance(found, str) else apart(expected, found, near)


def groups() -> list[frozenset[str]]:
    """Groups in which all pairs without a conflict meet, and each plugin alone.

    Pairs with a tolerance of their own have groups of their own.
    """
    plugins = {name: made(name) for name in PAIRED}

    def fits(names: frozenset[str]) -> bool:
        pairs = combinations(names, 2)
        return not any(are_enemies(plugins[one], plugins[other]) for one, other in pairs)

    pairs = [frozenset(pair) for pair in combinations(PAIRED, 2)]
    rounded = [pair for pair in pairs if ROUNDED.keys() & pair]
    exact = [pair for pair in pairs if pair not in rounded]
    alone = [frozenset({name}) for name in PAIRED]
    return [*alone, *covering(exact, fits), *covering(rounded, fits)]


@pytest.mark.slow
def test_every_pair_has_the_numbers_of_the_cpu(
    accelerator: HostAccelerator, tmp_path: Path
) -> None:
    """Fails if two plugins mix devices, or compute other results than on the CPU.

    Where a group fails, its pairs are tried one by one.
    """
    faults = {names: fault(names, accelerator, tmp_path) for names in groups()}
    for group in [names for names, found in faults.items() if found and len(names) > 2]:
        pairs = [frozenset(pair) for pair in combinations(group, 2)]
        faults |= {pair: fault(pair, accelerator, tmp_path) for pair in pairs}
    told = [f"{', '.join(sorted(names))}: {found}" for names, found in faults.items() if found]
    assert not told, "\n".join(told)


# -- examples

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))
DRAWN = ("06", "08", "11", "12", "13", "14")
"""Examples that draw random numbers on the device, which differ from the host's."""


class EnoughError(Exception):
    """Ends an example after two steps."""


def run_example(path: Path) -> None:
    """Run an example, or the engine's part of those with a handwritten loop."""
    parts = runpy.run_path(str(path), run_name="example")
    if own := parts.get("by_engine") or parts.get("main"):
        own()
    else:
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_the_numbers_of_the_cpu(
    path: Path, accelerator: HostAccelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an example mixes devices: two steps of each."""
    if path.stem.startswith("04"):
        pytest.importorskip("transformers")
    losses: list[float] = []
    steps = Engine.steps

    def two(engine: Engine, data: Any = None, **settings: Any) -> Iterator[Any]:
        for state in steps(engine, data, until="20 steps", eval_every="2 steps", eval_data={}):
            yield state
            if state.step == 2:
                losses.append(float(engine._progress.step.total))
                raise EnoughError

    monkeypatch.setattr(Engine, "steps", two)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name])
    for device in ("cpu", accelerator.device):
        monkeypatch.setitem(Engine.__init__.__kwdefaults__, "device", device)
        torch.manual_seed(0)
        with pytest.raises(EnoughError):
            run_example(path)
    on_host, on_device = losses
    assert on_device == pytest.approx(on_host, rel=0.2 if path.stem.startswith(DRAWN) else 1e-3)
