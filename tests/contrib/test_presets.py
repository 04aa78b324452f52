"""The presets sft and dpo, from a model folder and a file to an export for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("datasets")

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nexus_core.cli.run import main

CHATS = Path(__file__).parents[1] / "core/tiny_chats"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def nexus_run(*words: Any) -> str:
    ran = CliRunner().invoke(main, [*map(str, words)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.output


def a_model(folder: Path) -> None:
    """A random Llama with the tokenizer of the tiny chats."""
    tokenizer = AutoTokenizer.from_pretrained(CHATS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sets(**settings: Any) -> list[str]:
    pairs = ((name.replace("__", "."), value) for name, value in settings.items())
    return [word for name, value in pairs for word in ("--set", f"{name}={value}")]


def test_from_chats_and_pairs_to_folders_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_model(tmp_path / "model")
    small = {
        "data_chat__seq_len": 64, "data_chat__batch_size": 4, "data_chat__cache_dir": "cache",
        "data_chat__valid_share": 0.2, "eval_every": "50%",
    }  # fmt: skip
    given = sets(model_hf__path="model", data_chat__tokenizer="model", **small)
    chats = sets(data_chat__train=CHATS / "chats.jsonl", optim_adamw__lr=0.01)
    asked = sets(
        sample__tokens=4, sample__chat="true", sample__prompts=json.dumps(["3 and 3?"]), until=12
    )
    nexus_run("sft", *given, *chats, *asked, "--out", "run")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/lm_loss"] for line in lines if "train/lm_loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert any(
        "<|im_start|>" in json.dumps(line) or "3 and 3?" in json.dumps(line) for line in lines
    )

    (events,) = Path("run/tensorboard").glob("events*")
    assert b"model_hf.path=model" in events.read_bytes(), "TensorBoard shows what a run sets"

    nexus_run("export", "run", "--to", "hf", "--out", "merged")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    before = AutoModelForCausalLM.from_pretrained("model")
    assert AutoTokenizer.from_pretrained("merged").chat_template
    assert not torch.equal(
        merged.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight
    )

    pairs = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(24)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = sets(model_hf__path="merged", data_chat__tokenizer="merged", **small)
    chosen = sets(data_chat__train="pairs.jsonl", optim_adamw__lr=0.01, until=8)
    nexus_run("dpo", *given, *chosen, "--out", "better")
    lines = [json.loads(line) for line in Path("better/metrics.jsonl").read_text().splitlines()]
    margins = [line["dpo/margin"] for line in lines if "dpo/margin" in line]
    assert margins[-1] > margins[0]
