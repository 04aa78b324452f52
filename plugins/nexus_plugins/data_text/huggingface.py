"""Tokenizers in the format of Hugging Face's `tokenizers` package: a tokenizer.json."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_core.errors import DataError
from nexus_plugins.data_text.tokenizer import Encoded, Tokenizer

__all__ = ["HfTokenizer"]

Ids = NDArray[np.int64]

_EOS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]", "[SEP]")
_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
_WORDS_REMEMBERED = 200_000  # some tens of MB; the package's own default is 10,000
_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|bos|>", "[BOS]", "[CLS]", "<|startoftext|>")


class HfTokenizer(Tokenizer):
    """A tokenizer.json; truncation and padding in it are switched off, and text stays text.

    The names of special tokens that occur in a text are encoded like any other text.

    Args:
        text: of the file.
        path: for errors.
        eos_token, pad_token: None: found by their usual names; eos also stands in for pad.

    Raises:
        DataError: the file cannot be used, or has no such tokens.
    """

    kind = "tokenizer.json"

    def __init__(
        self, text: str, path: Path, eos_token: str | None = None, pad_token: str | None = None
    ) -> None:
        self._json = text
        self._path = path
        self._tokenizer = _load(text, path)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._vocabulary:
            raise DataError(f"{path} has an empty vocabulary; train it first")
        self.size = max(self._vocabulary.values()) + 1
        self.eos: int = self._required("eos", eos_token, _EOS)
        pad = self._find("pad", pad_token, _PAD)
        self.pad = self.eos if pad is None else pad
        self.bos = self._find("bos", None, _BOS)

    def _required(self, what: str, wish: str | None, names: Sequence[str]) -> int:
        found = self._find(what, wish, names)
        if found is None:
            added = self._tokenizer.get_added_tokens_decoder().values()
            special = ", ".join(repr(token.content) for token in added) or "none"
            raise DataError(
                f"{self._path} has no token that ends a document (looked for {', '.join(names)}); "
                f"its special tokens: {special}; set data_text.{what}_token (--{what}-token)"
            )
        return found

    def _find(self, what: str, wish: str | None, names: Sequence[str]) -> int | None:
        if wish is not None and wish not in self._vocabulary:
            raise DataError(
                f"{self._path} has no token '{wish}'; set data_text.{what}_token (--{what}-token) "
                "to one that it has"
            )
        known = (wish,) if wish is not None else names
        return next((self._vocabulary[name] for name in known if name in self._vocabulary), None)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def to_json(self) -> str:
        return self._json

    def encode_documents(self, texts: Sequence[bytes]) -> Encoded:
        words = [text.decode() for text in texts]
        by_table = self.token_bytes is not None
        batch = self._tokenizer.encode_batch_fast if by_table else self._tokenizer.encode_batch
        try:
            encoded = batch(words, add_special_tokens=False)
        except Exception as error:  # the package raises bare exceptions
            raise DataError(f"{self._path} cannot encode the text: {error}") from error
        joined, lengths = array("I"), np.empty(len(words), np.int64)
        for place, one in enumerate(encoded):
            own: list[int] = one.ids  # made anew at each access
            own.append(self.eos)
            joined.fromlist(own)
            lengths[place] = len(own)
        ids = np.frombuffer(joined, np.uint32)
        if by_table:
            return Encoded(ids, lengths, None)
        counts = [_byte_counts(word, one.offsets) for word, one in zip(words, encoded, strict=True)]
        return Encoded(ids, lengths, np.concatenate(counts) if counts else np.zeros(0, np.int64))

    @cached_property
    def token_bytes(self) -> Ids | None:
        """Known where every id stands for the same bytes everywhere: byte-level vocabularies."""
        layout = json.loads(self._json)
        added = self._tokenizer.get_added_tokens_decoder()
        if not _is_lossless(layout) or any(one.lstrip or one.rstrip for one in added.values()):
            return None
        lengths = np.zeros(self.size, np.int64)
        for token, number in self._vocabulary.items():
            lengths[number] = len(token)  # one letter of the byte-level alphabet a byte
        for number, token in added.items():
            lengths[number] = 0 if token.special else len(token.content.encode())
        return lengths


def _load(text: str, path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Implementation
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package tokenizers; install it with: "
            "pip install 'nexus-trainer[tokenizers]'"
        ) from error
    try:
        tokenizer = Implementation.from_str(text)
    except Exception as error:  # the package raises bare exceptions
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if hasattr(tokenizer.model, "_resize_cache"):  # changes the speed, never the ids
        tokenizer.model._resize_cache(_WORDS_REMEMBERED)
    return tokenizer


def _is_lossless(layout: dict[str, Any]) -> bool:
    """Whether the bytes of a text are exactly the bytes of its tokens."""
    steps = layout.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    removing = [part for part in parts if part.get("behavior") == "Removed"]
    kinds = {part.get("type") for part in parts} <= {"ByteLevel", "Split", "Digits", "Punctuation"}
    plain = layout.get("normalizer") is None and layout["model"].get("type") == "BPE"
    spaced = any(part.get("add_prefix_space", True) for part in byte_level)
    alphabet = layout["model"].get("vocab", {})
    complete = all(letter in alphabet for letter in _byte_alphabet())
    return plain and kinds and len(byte_level) == 1 and not removing and not spaced and complete


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _byte_counts(text: str, offsets: Sequence[tuple[int, int]]) -> Ids:
    """Bytes from the end of a token to the end of the next; the last takes the rest, eos none.

    They add up to the bytes of the text whatever the tokenizer leaves out.
    """
    edges = np.array([0, *accumulate(len(letter.encode()) for letter in text)])
    ends = np.array([end for _, end in offsets], np.int64)
    reached = edges[np.maximum.accumulate(ends)] if len(ends) else np.zeros(0, np.int64)
    if len(reached):
        reached[-1] = edges[-1]
    return np.append(np.diff(reached, prepend=0), 0)
