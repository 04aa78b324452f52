"""Hugging Face models: the numbers of a handwritten loop, isolated documents, nothing executed."""

from __future__ import annotations

import copy
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import SGD

from nexus_core import CheckpointError, ConfigError, Engine
from nexus_core.plan import load
from nexus_plugins.loss_lm import LossLmPlugin

pytest.importorskip("transformers")
from nexus_plugins_contrib.model_hf import ModelHfPlugin, passes
from tests.contrib import hf


def engine_on(model: Any, plugin: ModelHfPlugin, **options: Any) -> Engine:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = LossLmPlugin(label_smoothing=0.0)
    return Engine(model, optimizer, plugins=[plugin, losses], log_every=1, **options)


def batches(packed: bool, count: int) -> list[dict[str, Tensor]]:
    """Micro-batches with unequal numbers of labels."""
    if packed:
        rows = [[hf.documents(3, seed=7 * n + r) for r in range(2)] for n in range(count)]
        return [hf.packed(row) for row in rows]
    return [hf.padded(hf.documents(1 + n % 3, seed=n)) for n in range(count)]


def documents_of(batch: dict[str, Tensor]) -> list[Tensor]:
    """Its documents, one by one."""
    if "attention_mask" in batch:
        return [r[m == 1] for r, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    found = []
    for ids, labels, segments in zip(*(batch[k] for k in ("input_ids", "labels", "segment_ids")),
                                     strict=True):  # fmt: skip
        parts = [segments == number for number in segments.unique()]
        found += [ids[part] for part in parts if (labels[part] != -100).any()]
    return found


def by_hand(model: Any, steps: list[list[dict[str, Tensor]]]) -> list[float]:
    """Each document separately through the model's own loss; the mean over the step's labels."""
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in steps:
        documents = [document for batch in step for document in documents_of(batch)]
        labels = sum(len(document) - 1 for document in documents)
        optimizer.zero_grad()
        total = 0.0
        for document in documents:
            mean = model(input_ids=document[None], labels=document[None]).loss
            (mean * (len(document) - 1) / labels).backward()
            total += mean.item() * (len(document) - 1) / labels
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("kind", "accumulate", "packed"),
    [
        pytest.param(kind, accumulate, packed, marks=[pytest.mark.slow] * (n % 2))
        for n, (kind, accumulate, packed) in enumerate(
            product(("gpt2", "llama"), (1, 3, 4), (False, True))
        )
    ],
)
def test_losses_and_weights_are_those_of_a_loop_by_hand(
    kind: str, accumulate: int, packed: bool
) -> None:
    """Fails if labels, documents or micro-batches are weighted differently than one by one."""
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}
    model, other = (hf.tiny(kind, **quiet).train() for _ in range(2))
    micro = batches(packed, 3 * accumulate)
    engine = engine_on(model, ModelHfPlugin(path="."), accumulate=accumulate)
    ours = [engine.metrics["train/total_loss"] for _ in engine.steps(micro, until="3 steps")]
    steps = [micro[n : n + accumulate] for n in range(0, len(micro), accumulate)]
    assert ours == pytest.approx(by_hand(other, steps), abs=1e-6, rel=1e-6)
    for one, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (one - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "mistral", "gemma", "gemma2", "mamba"])
def test_a_packed_document_has_the_loss_that_it_has_alone(kind: str) -> None:
    """Fails if documents of a row see one another, or positions or sliding window are wrong."""
    model = hf.tiny(kind).eval()
    documents = hf.documents(6, seed=3, longest=12)
    packed = hf.packed([documents[:3], documents[3:]])
    engine = engine_on(model, plugin := ModelHfPlugin(path="."))
    found = engine.evaluate([packed])["val/lm_loss"]
    alone = [model(input_ids=d[None], labels=d[None]).loss.item() * (len(d) - 1) for d in documents]
    assert found == pytest.approx(sum(alone) / sum(len(d) - 1 for d in documents), abs=2e-6)
    assert plugin.state_dict()["rows"] == ("unpacked" if kind == "mamba" else "isolated")
    assert bool(plugin.state_dict()["headless"]) == (kind != "gemma2")
    together = model(input_ids=torch.cat(documents[:3])[None]).logits
    apart = torch.cat([model(input_ids=d[None]).logits[0] for d in documents[:3]])
    assert (together[0] - apart).abs().max() > 1e-3, "documents matter to one another here"


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gemma2", {}, "its logits are not"),
        ("gemma2", {"final_logit_softcapping": None}, None),
        ("opt", {}, "its body is not called as a whole"),
        ("llama", {"tie_word_embeddings": True}, None),
    ],
)
def test_full_logits_are_taken_where_the_head_is_more_than_a_product(
    kind: str, changes: dict[str, Any], reason: str | None
) -> None:
    """Fails if a soft cap, invisible for small logits, is missed, or the check has side effects."""
    model = hf.tiny(kind, initializer_range=1e-3, **changes).eval()
    state = torch.get_rng_state()
    said = passes.full_logits_because(model, torch.arange(2, 20)[None])
    assert bool(said) == bool(reason)
    assert (said or "").startswith(reason or "")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_full_logits_on_request_give_the_same_loss() -> None:
    batch = hf.padded(hf.documents(3))
    losses = [
        engine_on(hf.tiny("llama"), ModelHfPlugin(path=".", logits=how)).evaluate([batch])
        for how in ("auto", "full")
    ]
    assert losses[0]["val/lm_loss"] == pytest.approx(losses[1]["val/lm_loss"], abs=1e-6)


def make(path: str | Path, **settings: Any) -> Any:
    return begun(path, **settings).model


def begun(path: str | Path, **settings: Any) -> Engine:
    parts = [hf.RowsPlugin([hf.padded(hf.documents(3))]), ModelHfPlugin(path=str(path), **settings)]
    return Engine(plugins=[*parts, load("optim_adamw")(), load("loss_lm")()], seed=4)


def test_weights_and_random_weights(tmp_path: Path) -> None:
    folder = hf.saved(tmp_path / "m", "llama", seed=9)
    assert torch.equal(make(folder).lm_head.weight, hf.tiny("llama", seed=9).lm_head.weight)
    one, other = (make(folder, weights="random") for _ in range(2))
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, make(folder).lm_head.weight)
    assert make(folder, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16
    assert make(folder, config={"attention_dropout": 0.5}).config.attention_dropout == 0.5


def spoil(folder: Path, how: str) -> dict[str, Any]:
    """Damage a model's folder."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "code":
        facts = json.loads(config.read_text()) | {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.C"},
        }
        (folder / "own.py").write_text("raise SystemExit('executed')")
        config.write_text(json.dumps(facts))
    elif how == "pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "part":
        tensors = load_file(weights)
        tensors.pop("lm_head.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "no config":
        config.unlink()
    elif how == "gone":
        shutil.rmtree(folder)
    elif how == "entry":
        return {"config": {"atention_dropout": 0.1}}
    elif how == "revision":
        return {"revision": "main"}
    return {}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("code", "ships its own modelling code"),
        ("pickle", "has no \\*.safetensors"),
        ("part", "lacks lm_head.weight"),
        ("cut", "cannot load"),
        ("no config", "has no config.json"),
        ("gone", "no folder"),
        ("entry", "model_hf.config.atention_dropout"),
        ("revision", "which has no revisions"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_error(how: str, said: str, tmp_path: Path) -> None:
    """Fails if code in the folder is executed, or part of the model stays random."""
    folder = Path(hf.saved(tmp_path / "m", "llama"))
    settings = spoil(folder, how)
    with pytest.raises(ConfigError, match=said) as caught:
        make(folder, **settings)
    assert "\n" not in str(caught.value)


def cached(cache: Path, folder: str, commit: str) -> None:
    """Lay out a folder like the Hub cache."""
    place = cache / "models--someone--tiny"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs/main").write_text(commit)


def test_an_id_is_read_from_the_cache_and_its_commit_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run could resume with a later commit of a branch."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", hf.saved(tmp_path / "m", "llama"), "a" * 40)
    first = begun("someone/tiny")
    assert first.plugins["model_hf"].config.revision == "a" * 40
    first.fit(until=1)
    snapshot = copy.deepcopy(first.state_dict())
    begun("someone/tiny").load_state_dict(copy.deepcopy(snapshot))
    cached(tmp_path / "hub", hf.saved(tmp_path / "n", "llama", seed=1), "b" * 40)
    with pytest.raises(CheckpointError, match=f"began at commit {'a' * 40}"):
        begun("someone/tiny").load_state_dict(snapshot)
    with pytest.raises(ConfigError, match="cannot load 'someone/other' from the hub"):
        make("someone/other")
