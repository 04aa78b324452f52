"""Tiny tokenizers for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and its successors split text."""
GPT2 = r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 splits text: the last of several line breaks belongs to the next word."""


def byte_level(
    special: Sequence[str] = (), words: str = WORDS, **settings: Any
) -> PreTrainedTokenizerFast:
    """One id per byte, and some for longer words, so that encoding is lossless."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = [("l", "l"), ("ll", "o"), ("h", "e"), ("he", "llo"), ("i", "n"), ("in", "g")]
    merges += [("t", "he"), ("Ġ", "the"), ("Ġ", "hello"), ("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "is")]
    merges[-1:] = [("i", "s"), ("Ġ", "is")]
    for one, other in merges:
        vocabulary.setdefault(one + other, len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(one, normalized=False) for one in ("<eos>", "<pad>")])
    inner.add_special_tokens([AddedToken(one, normalized=False) for one in special])
    given = {"eos_token": "<eos>", "pad_token": "<pad>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **given)


def saved(folder: Path, special: Sequence[str] = (), **settings: Any) -> str:
    """The folder of such a tokenizer."""
    byte_level(special, **settings).save_pretrained(folder)
    return str(folder)
