"""Tiny tokenizers for tests, made here and saved where a test wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["Ġthe", "Ġa", "Ġis", "he", "ll", "llo", "hello", "Ġhello", "in", "ing", "Ċ"]


def byte_level(special: list[str] = (), **settings: Any) -> PreTrainedTokenizerFast:  # type: ignore[assignment]
    """One id a byte and a few words of several, so that text always comes back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = [("l", "l"), ("ll", "o"), ("h", "e"), ("he", "llo"), ("i", "n"), ("in", "g")]
    merges += [("t", "he"), ("Ġ", "the"), ("Ġ", "hello"), ("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "is")]
    merges[-1:] = [("i", "s"), ("Ġ", "is")]
    for one, other in merges:
        vocabulary.setdefault(one + other, len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(one, normalized=False) for one in ("<eos>", "<pad>")])
    inner.add_special_tokens([AddedToken(one, normalized=False) for one in special])
    given = {"eos_token": "<eos>", "pad_token": "<pad>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **given)


def saved(folder: Path, special: list[str] = (), **settings: Any) -> str:  # type: ignore[assignment]
    """The folder of such a tokenizer."""
    byte_level(special, **settings).save_pretrained(folder)
    return str(folder)
