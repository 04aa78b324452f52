"""Hugging Face exports: another program that loads them computes the same as the trained model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_core import Engine
from nexus_core.cli.run import main as nexus_run
from nexus_core.plan import load
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin

pytest.importorskip("transformers")
pytest.importorskip("peft")
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_plugins_contrib.export_hf import parity
from tests.contrib import hf

NEXUS = {"vocab_size": hf.VOCABULARY, "d_model": 16, "ssm_n_layers": 2, "ssm_head_dim": 8,
         "ssm_chunk_length": 4}  # fmt: skip


def trained(out: Path, blocks: dict[str, dict[str, Any]]) -> Engine:
    """Train three steps with these plugins, and save the final checkpoint."""
    rows = hf.RowsPlugin([hf.padded(hf.documents(2, seed=n)) for n in range(3)])
    shown = [load(name)(**settings) for name, settings in blocks.items()]
    rest = [LossLmPlugin(), OptimAdamwPlugin(lr=1e-2), CheckpointPlugin(every=3, sync=True)]
    engine = Engine(plugins=[rows, *shown, *rest], seed=2, out=out, config={"plugins": blocks})
    engine.fit(until=3)
    return engine


def export(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(nexus_run, ["export", *map(str, words), "--to", "hf"])
    return result.exit_code, result.output


def ids() -> Tensor:
    return torch.stack([torch.arange(2, 26), torch.arange(40, 64)])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(ids()).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_trained_model_comes_back_with_its_tokenizer_in_shards(kind: str, tmp_path: Path) -> None:
    """Fails if a weight, the tokenizer or its template is lost, or the receipt is missing."""
    tied = {"tie_word_embeddings": True}
    folder = hf.saved(tmp_path / "base", kind, **tied)
    engine = trained(tmp_path / "run", {"model_hf": {"path": folder}})
    code, said = export(tmp_path / "run", "--out", tmp_path / "out", "--shard", "20KB")
    assert code == 0, said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(model) - logits(engine.model)).abs().max() == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == hf.tokenizer().chat_template
    assert tokenizer("ab").input_ids == hf.tokenizer()("ab").input_ids
    receipt = json.loads((tmp_path / "out/parity.json").read_text())
    assert receipt["largest_logit_difference"] <= receipt["bound"] < 1e-3
    assert (receipt["step"], receipt["rows"], receipt["length"]) == (3, 2, 32)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_merged_or_alone(tmp_path: Path) -> None:
    """Fails if adapters are lost, or a merged model needs peft."""
    from peft import PeftModel

    folder = hf.saved(tmp_path / "base", "llama")
    engine = trained(tmp_path / "run", {"model_hf": {"path": folder}, "peft": {"r": 4}})
    expected = logits(engine.model)
    assert export(tmp_path / "run", "--out", tmp_path / "merged")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    assert (logits(merged) - expected).abs().max() <= 1e-5
    code, said = export(tmp_path / "run", "--out", tmp_path / "alone", "--adapters", "alone")
    assert code == 0, said
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(base) - expected).abs().max() > 1e-3, "training did something"
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "alone"))
    assert (logits(adapted) - expected).abs().max() <= 1e-5
    assert all("lora_" in name for name in load_file(tmp_path / "alone/adapter_model.safetensors"))


FRESH = """
import builtins, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
real = builtins.__import__
def without(name, *rest, **more):
    assert not name.startswith(("nexus_core", "nexus_plugins", "pydantic")), name
    return real(name, *rest, **more)
given = load_file(sys.argv[2])
builtins.__import__ = without
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
builtins.__import__ = real
found = {"logits": model(given["ids"]).logits.detach()}
few = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
found["written"] = model.generate(given["ids"], **few)
left = torch.nn.functional.pad(given["ids"], (3, 0), value=1)
mask = torch.nn.functional.pad(torch.ones_like(given["ids"]), (3, 0))
found["padded"] = model.generate(left, attention_mask=mask, **few)[:, 3:].contiguous()
found["beams"] = model.generate(given["ids"], num_beams=3, **few).contiguous()
save_file(found, sys.argv[3])
"""


@pytest.mark.slow
def test_nexus_is_loaded_where_no_trainer_is_and_writes_the_same(tmp_path: Path) -> None:
    """Fails if the folder needs the trainer, or logits or greedy text differ from ours."""
    engine = trained(tmp_path / "run", {"model_nexus": NEXUS})
    code, said = export(tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0, said
    given, found = tmp_path / "given.safetensors", tmp_path / "found.safetensors"
    save_file({"ids": ids()}, given)
    words = [sys.executable, "-c", FRESH, tmp_path / "out", given, found]
    ran = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    tensors, model = load_file(found), engine.model.eval()
    with torch.no_grad():
        assert (tensors["logits"] - model(ids())).abs().max() <= 1e-5
        expected = model.generate(ids(), 12, temperature=0)
    assert torch.equal(tensors["written"], expected)
    assert torch.equal(tensors["padded"], expected), "padding before a prompt changes nothing"
    assert tensors["beams"].shape == expected.shape


def test_an_export_that_computes_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a folder is created although its model differs from the trained one."""
    folder = hf.saved(tmp_path / "base", "llama")
    trained(tmp_path / "run", {"model_hf": {"path": folder}})
    module = sys.modules["nexus_plugins_contrib.export_hf.export"]
    right = module.logits_of
    seen: list[int] = []

    def wrong(model: Any, batch: Tensor) -> Tensor:
        seen.append(1)
        return right(model, batch) + (1e-2 if len(seen) == 2 else 0)

    monkeypatch.setattr(module, "logits_of", wrong)
    code, said = export(tmp_path / "run", "--out", tmp_path / "out")
    assert code == 2
    assert "does not match the trained model" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_the_bound_is_relative_to_the_logits() -> None:
    one = 100 * torch.randn(2, 8, 9)
    compared = parity.compare(one, one + 1e-4, True, Path("x"), 1)
    assert compared.kl_divergence < 1e-12
    assert compared.bound == pytest.approx(1e-5 * one.abs().max().item())


@pytest.mark.parametrize(
    ("words", "said"), [(["--adapters", "alone"], "not adapters"), (["--ema"], "has no averages")]
)
def test_what_cannot_be_exported_is_one_clear_error(
    words: list[str], said: str, tmp_path: Path
) -> None:
    folder = hf.saved(tmp_path / "base", "llama")
    trained(tmp_path / "run", {"model_hf": {"path": folder}})
    code, output = export(tmp_path / "run", "--out", tmp_path / "out", *words)
    assert code == 2
    assert said in output
    assert not (tmp_path / "out").exists()


def test_a_format_that_is_not_there_is_named(tmp_path: Path) -> None:
    words = ["export", str(tmp_path), "--out", str(tmp_path / "out"), "--to", "hff"]
    result = CliRunner().invoke(nexus_run, words)
    assert (result.exit_code, "Did you mean 'hf'" in result.output) == (2, True)
