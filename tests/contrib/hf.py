"""Tiny random Hugging Face models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nexus_core import Plugin, PluginConfig, RunData, hookimpl

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": _SIZES,
    "qwen3": _SIZES,
    "mistral": {**_SIZES, "sliding_window": 6},
    "gemma": _SIZES,
    "gemma2": {**_SIZES, "sliding_window": 6},  # caps its logits
    "mamba": {**_SMALL, "state_size": 4},
    "opt": {
        **_SMALL, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


def tiny(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model, lively enough that documents would affect one another."""
    torch.manual_seed(seed)
    settings = {**SIZES[kind], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, **changes}
    settings.setdefault("initializer_range", 0.1)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings))


def saved(folder: Path, kind: str, seed: int = 0, **changes: Any) -> str:
    """The folder of such a model, with a matching tokenizer."""
    tiny(kind, seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per letter, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(point) for point in range(32, 32 + VOCABULARY - 2)]
    words = {"<eos>": 0, "<pad>": 1, **{letter: 2 + i for i, letter in enumerate(letters)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


def documents(count: int, seed: int = 0, longest: int = 9) -> list[Tensor]:
    """Texts of 2 to `longest` ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in lengths]


def following(document: Tensor) -> Tensor:
    """The label of each position: the next id; ignored at the end."""
    return torch.cat([document[1:], document.new_tensor([-100])])


def packed(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Rows of equal length, each with several documents and padding at the end."""
    width = max(sum(map(len, row)) for row in rows)
    batch = {
        "input_ids": torch.ones(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
        "segment_ids": torch.zeros(len(rows), width, dtype=torch.int32),
    }
    for number, row in enumerate(rows):
        at = 0
        for place, document in enumerate(row):
            part = (number, slice(at, at + len(document)))
            batch["input_ids"][part] = document
            batch["labels"][part] = following(document)
            batch["segment_ids"][part] = place
            at += len(document)
        batch["segment_ids"][number, at:] = len(row)
    return batch


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """One document per row, padded at the end."""
    batch = packed([[row] for row in rows])
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "attention_mask": (batch["segment_ids"] == 0).long(),
    }


class RowsPlugin(Plugin[PluginConfig]):
    """Provides batches made by a test as the data of a run."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self._batches = batches

    @hookimpl
    def make_data(self) -> RunData:
        return RunData(self._batches, {})
