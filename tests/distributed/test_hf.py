"""Hugging Face models and adapters in two processes: the numbers of one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from safetensors.torch import load_file

from nexus_core import Engine, Plugin
from nexus_core.processes import whole
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ddp import DdpPlugin
from nexus_plugins.fsdp import FsdpPlugin
from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin
from tests.distributed.processes import together
from tests.distributed.works import Seen, StopperPlugin
from tiny import RecorderPlugin

pytest.importorskip("peft")
pytest.importorskip("datasets")
from nexus_plugins_contrib.data_hf import DataHfPlugin
from nexus_plugins_contrib.model_hf import ModelHfPlugin
from nexus_plugins_contrib.peft import PeftPlugin
from tests.contrib import hf

pytestmark = pytest.mark.slow
Case: TypeAlias = tuple[str, dict[str, Any] | None]
WHOLE: Case = ("pad", None)
ADAPTED: Case = ("pack", {"r": 4})
WAYS = {
    "ddp": (partial(DdpPlugin, timeout=30), [ADAPTED]),
    "fsdp": (partial(FsdpPlugin, timeout=30), [WHOLE, ADAPTED]),
}


def train(
    make: Any,
    folder: Path,
    batching: str,
    adapters: dict[str, Any] | None,
    out: Path | None = None,
    stop_at: int = 0,
    resume: bool = False,
) -> Seen:
    """Eight steps on texts of unequal lengths; returns the final weights."""
    seen, recorder, parallel, stopper = Seen(), RecorderPlugin(), make(), StopperPlugin()
    parallel.join()
    stopper.at, stopper.reason = stop_at, "for the test"
    data = DataHfPlugin(
        train=str(folder / "texts.jsonl"), tokenizer=str(folder), seq_len=12, batch_size=4,
        batching=batching, valid_share=0.2, cache_dir=folder / f"cache-{parallel.name}",
    )  # fmt: skip
    plugins: list[Plugin[Any]] = [
        parallel, recorder, stopper, data, ModelHfPlugin(path=str(folder)), ClipPlugin(),
        LossLmPlugin(label_smoothing=0.0), OptimAdamwPlugin(lr=1e-2, eps=1e-4),
    ]  # fmt: skip
    plugins += [] if adapters is None else [PeftPlugin(**adapters)]
    plugins += [] if out is None else [CheckpointPlugin(every="3 steps")]
    engine = Engine(plugins=plugins, seed=1, log_every=1, accumulate=2, out=out)
    if resume:
        engine.resume()
    engine.fit(until=8, eval_every=4)
    lines = [line for _, line in recorder.lines]
    seen.logged = [line for line in lines if "train/total_loss" in line]
    seen.evaluations = [line for line in lines if "val/loss" in line]
    named = engine.model.named_parameters()
    seen.last = {name: whole(p.detach()).reshape(-1).tolist() for name, p in named}
    return seen


def train_all(make: Any, cases: list[Case], folder: Path, out: Path) -> list[list[Seen]]:
    """Each case uninterrupted, and stopped and resumed, in one pair of processes."""
    found = []
    for number, case in enumerate(cases):
        saved = partial(train, make, folder, *case, out / str(number))
        found.append([saved(stop_at=5), saved(resume=True)])
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_numbers_of_one_and_resume(way: str, tmp_path: Path) -> None:
    """Fails if a head is used with an ungathered weight, or a shard is mistaken for the whole."""
    folder = Path(hf.saved(tmp_path / "model", "llama"))
    texts = ["ABCDEFGHIJ"[: 2 + n % 8] + str(n) for n in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    make, cases = WAYS[way]
    whole = [train(make, folder, *case) for case in cases]
    for seen in together(2, train_all, make, cases, folder, tmp_path):
        for (first, second), alone in zip(seen, whole, strict=True):
            logged = first.logged + second.logged, first.evaluations + second.evaluations
            for lines, expected in zip(logged, (alone.logged, alone.evaluations), strict=True):
                assert len(lines) == len(expected) > 0
                for own, other in zip(lines, expected, strict=True):
                    assert own == pytest.approx(other, rel=1e-6)
            assert second.last.keys() == alone.last.keys()
            for name, numbers in second.last.items():
                assert numbers == pytest.approx(alone.last[name], abs=1e-6), name
    for number, (_, adapters) in enumerate(cases):
        final = tmp_path / str(number) / "checkpoints/final"
        names = {name for file in final.rglob("*.safetensors") for name in load_file(file)}
        weights = {name for name in names if "q_proj.weight" in name or "base_layer" in name}
        assert bool(weights) == (adapters is None), names
