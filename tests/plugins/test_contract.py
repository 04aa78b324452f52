"""Every plugin of this distribution fulfils the contract."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from called import pairs
from nexus_core import Batch, Loss, LossConfig, Plugin, ResumableLoader, hookimpl
from nexus_core.plan import load
from nexus_core.testing import PluginContract, tiny_model

QUICK = {
    "test_config_is_strict",
    "test_config_is_repeated_by_its_dump",
    "test_hooks_are_known",
    "test_device_is_not_waited_for",
}
"""Checks in the fast lane; the others take a minute for all plugins."""


class FirstPartyContract(PluginContract):
    """The contract with its longer checks marked as slow."""

    @classmethod
    @cache
    def cases(cls) -> list[dict[str, Any]]:
        """Cached, as each check of each plugin calls it."""
        return super().cases()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marks = [] if metafunc.function.__name__ in QUICK else [pytest.mark.slow]
        if "settings" in metafunc.fixturenames:
            cases = [pytest.param(case, marks=marks) for case in self.cases()]
            metafunc.parametrize("settings", cases, ids=range(len(cases)))
        if "accumulate" in metafunc.fixturenames:
            each = (3,) if "resume" in metafunc.function.__name__ else (1, 3)  # from files: 1
            metafunc.parametrize("accumulate", each, ids="accumulate-{}".format)


class OnWeights(FirstPartyContract):
    """For plugins that start from weights: a file of another tiny model's weights."""

    def settings_in(self, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        source = folder / "before.safetensors"
        with torch.random.fork_rng():
            torch.manual_seed(3)
            save_file(tiny_model().state_dict(), source)
        return {**settings, "source": str(source)}


class OnNexus(FirstPartyContract):
    """For losses of NEXUS module reports: adds a small NEXUS."""

    pytestmark = pytest.mark.slow
    tolerance = 1e-3

    def beside(self) -> Iterable[Plugin[Any]]:
        sizes = {"vocab_size": 13, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16}
        return [load("model_nexus")(**sizes, reason=True, causal=True)]


class ChosenPlugin(Loss[LossConfig]):
    """A loss of the chosen answers, whichever plugin runs the model on them."""

    @hookimpl
    def forward(self, engine: Any, batch: Batch) -> Any:
        ids = batch.get("chosen_input_ids")
        return None if ids is None else engine.model(ids)

    def units(self, batch: Batch) -> float:
        return float(len(batch["chosen_labels"]))

    def loss(self, batch: Batch, output: Any) -> Tensor:
        rows = output.chosen[:, None] if hasattr(output, "chosen") else output.flatten(1)
        return rows.square().mean(1).sum()


class OnPairs(FirstPartyContract):
    """For preference losses; the second loss has to handle pairs too."""

    def data(self) -> Iterable[Batch]:
        return ResumableLoader(pairs()[0], 4)

    def losses(self) -> Iterable[Plugin[Any]]:
        return [ChosenPlugin(weight=0.01)]


class OnText(FirstPartyContract):
    """For plugins that read text: a file, and a model of bytes."""

    pytestmark = pytest.mark.slow

    def model(self) -> nn.Module:
        return tiny_model(vocabulary=300)

    def settings_in(self, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        text = folder / "corpus.txt"
        text.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(400)))
        return {**settings, "train": str(text), "cache_dir": str(folder / "cache")}


class OnRecords(FirstPartyContract):
    """For plugins that read records: texts or chats, and a tokenizer of single letters."""

    pytestmark = pytest.mark.slow

    def model(self) -> nn.Module:
        return tiny_model(vocabulary=97)

    def settings_in(self, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        from tests.contrib import hf

        hf.tokenizer().save_pretrained(folder / "tokenizer")
        texts = [f"line {i}: {'ab' * (i % 17)}" for i in range(40)]
        talks = [[("user", f"{i}?"), ("assistant", text)] for i, text in enumerate(texts)]
        chats = [[{"role": who, "content": said} for who, said in talk] for talk in talks]
        lines = [{"text": t, "messages": chat} for t, chat in zip(texts, chats, strict=True)]
        records = folder / "records.jsonl"
        records.write_text("".join(json.dumps(line) + "\n" for line in lines))
        others = folder / "others.jsonl"
        others.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines[:10])))
        changing = [{"path": str(records), "weight": [[0, 3], ["200 tokens", 1]]}]
        train = [*changing, {"path": str(others)}] if settings.get("streaming") else str(records)
        places = {"train": train, "tokenizer": str(folder / "tokenizer")}
        return {**settings, **places, "cache_dir": str(folder / "cache")}


class Compiled(FirstPartyContract):
    """For `compile`: resets the compiler between checks, with a larger time budget."""

    pytestmark = pytest.mark.slow

    def setup_method(self) -> None:
        torch.compiler.reset()


TIMED = {"start_length": 2, "end_length": 8, "round_to": 2, "warmup": "4 steps"}
RULE = {"target": "tiny_next.weight", "start": 0.5, "end": 1.0, "over": "4 steps"}
ON_FP16 = {"dtype": "fp16", "initial_scale": 1024.0, "growth_interval": 2}
BASES: Mapping[str, type[FirstPartyContract]] = {
    "compile": Compiled,
    "data_chat": OnRecords,
    "data_hf": OnRecords,
    "data_text": OnText,
    "init": OnWeights,
    "loss_dpo": OnPairs,
    **dict.fromkeys(
        ("loss_causal", "loss_energy", "loss_lm", "loss_reason", "loss_world", "worth"), OnNexus
    ),
}
NEEDS: Mapping[str, Mapping[str, Any]] = {
    "amp": {"configs": ({}, ON_FP16), "tolerance": 2e-2},
    "checkpoint": {"configs": ({"every": "4 steps"},), "off": {"every": "2 steps"}},
    "clip": {"configs": ({}, {"max_norm": 0.01}), "off": {"max_norm": 1e9}},
    "console": {"off": {}},
    "curriculum": {"configs": (TIMED, {**TIMED, "mode": "truncate"}), "off": {"start_length": 8}},
    "data": {"configs": ({"call": "called:text", "batch_size": 4},)},
    "data_chat": {"configs": ({"train": "", "tokenizer": "-", "seq_len": 48, "batch_size": 2},)},
    "data_hf": {
        "configs": (
            {"train": "", "tokenizer": "-", "seq_len": 32, "batch_size": 2},
            {"train": "", "tokenizer": "-", "seq_len": 32, "batch_size": 2, "streaming": True},
        ),
        "pytestmark": [
            pytest.mark.slow,
            pytest.mark.filterwarnings("ignore:.*tokens of the training data are not trained on"),
        ],
    },
    "data_text": {"configs": ({"seq_len": 32, "batch_size": 2},)},
    "early_stop": {"off": {}},
    "ema": {"off": {}},
    "guard": {"configs": ({}, {"policy": "rollback", "spike_threshold": 100.0}), "off": {}},
    "init": {"configs": ({"source": "before.safetensors", "skip": ["head.*"]},)},
    "jsonl": {"off": {}},
    "loss": {
        "configs": (
            {"call": "called:next_id", "units": "called:labels", "args": {"smoothing": 0.1}},
            {"call": "called:mean_next_id", "metrics": {"hits": "called:hits"}},
        )
    },
    "loss_distill": {"configs": ({"teacher": {"call": "nexus_core.testing:tiny_model"}},)},
    "loss_reason": {"configs": ({"weight": 1.0},)},
    "tape": {"configs": ({}, {"every": 3, "modules": 0}), "budget": 3.0, "seconds": 0.1},
    "lr_finder": {"resumes_after_stop": False},
    "lr_cosine": {"configs": ({"warmup": "2 steps"},)},
    "model": {"configs": ({"call": "nexus_core.testing:tiny_model", "args": {"dropout": 0.2}},)},
    "model_nexus": {
        "configs": ({"vocab_size": 13, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16},),
        "pytestmark": pytest.mark.slow,
        "tolerance": 1e-3,
    },
    "optim": {
        "configs": (
            {"call": "torch.optim:RAdam", "lr": 1e-2, "groups": [{"match": "*.bias", "lr": 1e-3}]},
        )
    },
    "pcgrad": {"budget": 2.0},  # one gradient per term, and the projections
    "recompute": {"off": {}},
    "sample": {"configs": ({"tokens": 3},), "off": {"tokens": 1}},
    "schedule": {"configs": ({"rules": [RULE]},)},
    "tensorboard": {"off": {}},
    "throughput": {"off": {}},
    "weigh_gradnorm": {"configs": ({}, {"every": 2})},
}


def contract_of(name: str) -> type[FirstPartyContract]:
    """The contract of one plugin, with its requirements."""
    return type(f"Test_{name}", (BASES.get(name, FirstPartyContract),), {
        "plugin": name, "__module__": __name__, **NEEDS.get(name, {})
    })  # fmt: skip


OF_VENDORS = ("data_chat", "data_hf") if find_spec("datasets") else ()
NAMES = [
    *(e.name for e in entry_points(group="nexus.plugins") if e.value.startswith("nexus_plugins.")),
    *OF_VENDORS,
]
globals().update({f"Test_{name}": contract_of(name) for name in NAMES})


def test_no_need_is_of_a_plugin_that_is_gone() -> None:
    """Fails if an entry above belongs to no plugin."""
    assert {*NEEDS, *BASES} <= {*NAMES, "data_chat", "data_hf"}
