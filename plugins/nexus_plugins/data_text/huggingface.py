"""Tokenizers in the format of Hugging Face's `tokenizers` package: a tokenizer.json."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from functools import cached_property
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
_SPACES = np.array([point for point in range(0x3001) if chr(point).isspace()], np.uint32)
_GAPS, _MORE = 4, 100_000  # maximum vocabulary size: this multiple of its tokens, plus a constant
_WORDS_REMEMBERED = 200_000  # some tens of MB; the package's own default is 10,000
_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|bos|>", "[BOS]", "[CLS]", "<|startoftext|>")


class HfTokenizer(Tokenizer):
    """A tokenizer.json with truncation and padding disabled, and text kept as text.

    Special-token names that occur in a text are encoded like any other text.

    Args:
        text: content of the file.
        path: path of the file, for errors.
        eos_token, pad_token: None: found by their usual names; eos also stands in for pad.

    Raises:
        DataError: the file is unusable, or lacks these tokens.
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
        if self.size > _GAPS * len(self._vocabulary) + _MORE:
            raise DataError(
                f"{path} has {len(self._vocabulary):,} tokens, but ids up to {self.size - 1:,}; "
                "renumber its tokens without such gaps"
            )
        self.eos: int = self._required("eos", eos_token, _EOS)
        pad = self._find("pad", pad_token, _PAD)
        self.pad = self.eos if pad is None else pad
        self.bos = self._find("bos", None, _BOS)
        self._unknown = _unknown(self._tokenizer, self._vocabulary)

    def _required(self, what: str, wish: str | None, names: Sequence[str]) -> int:
        found = self._find(what, wish, names)
        if found is None:
            added = self._tokenizer.get_added_tokens_decoder().values()
            special = ", ".join(repr(token.content) for token in added) or "none"
            raise DataError(
                f"{self._path} has no end-of-document token (looked for {', '.join(names)}); "
                f"its special tokens: {special}; set data_text.{what}_token (--{what}-token)"
            )
        return found

    def _find(self, what: str, wish: str | None, names: Sequence[str]) -> int | None:
        if wish is not None and wish not in self._vocabulary:
            raise DataError(
                f"{self._path} has no token '{wish}'; set data_text.{what}_token (--{what}-token) "
                "to an existing one"
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
        except BaseException as error:  # the package raises bare exceptions, and panics
            raise _not_interrupted(error, f"{self._path} cannot encode the text") from error
        joined, lengths = array("I"), np.empty(len(words), np.int64)
        for place, one in enumerate(encoded):
            own: list[int] = one.ids  # copied at each access
            own.append(self.eos)
            joined.fromlist(own)
            lengths[place] = len(own)
        ids = np.frombuffer(joined, np.uint32)
        if by_table:
            return Encoded(ids, lengths, None)
        counts = [
            _byte_counts(word, one.offsets, np.array(one.ids, np.int64) != self._unknown)
            for word, one in zip(words, encoded, strict=True)
        ]
        known = np.concatenate([np.zeros(0, np.int64), *counts])
        return Encoded(ids, lengths, known, sum(map(len, texts)) - int(known.sum()))

    @cached_property
    def token_bytes(self) -> Ids | None:
        """The bytes of text of each id, if that is fixed, as in byte-level vocabularies."""
        layout = json.loads(self._tokenizer.to_str())
        added = self._tokenizer.get_added_tokens_decoder()
        if not _is_lossless(layout) or any(one.lstrip or one.rstrip for one in added.values()):
            return None
        lengths = np.zeros(self.size, np.int64)
        for token, number in self._vocabulary.items():
            lengths[number] = len(token)  # one character of the byte-level alphabet per byte
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
    except BaseException as error:  # the package raises bare exceptions, and panics
        raise _not_interrupted(error, f"{path} is not a tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if hasattr(tokenizer.model, "_resize_cache"):  # changes the speed, never the ids
        tokenizer.model._resize_cache(_WORDS_REMEMBERED)
    return tokenizer


def _not_interrupted(error: BaseException, what: str) -> DataError:
    """The error in words; KeyboardInterrupt and SystemExit are re-raised."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    return DataError(f"{what}: {error}")


def _is_lossless(layout: dict[str, Any]) -> bool:
    """Whether the bytes of a text are exactly the bytes of its tokens."""
    steps = layout.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    removing = [part for part in parts if part.get("behavior") == "Removed"]
    kinds = {part.get("type") for part in parts} <= {"ByteLevel", "Split", "Digits", "Punctuation"}
    model = layout["model"]
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    plain = layout.get("normalizer") is None and model.get("type") == "BPE" and not marked
    spaced = any(part.get("add_prefix_space", True) for part in byte_level)
    alphabet = model.get("vocab", {})
    complete = all(letter in alphabet for letter in _byte_alphabet())
    return plain and kinds and len(byte_level) == 1 and not removing and not spaced and complete


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _unknown(tokenizer: Any, vocabulary: dict[str, int]) -> int:
    """The id of text that the vocabulary lacks; -1 if it has no such id."""
    model = json.loads(tokenizer.to_str()).get("model", {})
    by_number = model.get("unk_id")
    named = vocabulary.get(model.get("unk_token") or "", -1)
    return by_number if isinstance(by_number, int) else named


def _byte_counts(text: str, offsets: Sequence[tuple[int, int]], known: NDArray[np.bool_]) -> Ids:
    """Bytes of text that each token stands for; 0 for eos.

    Spaces between tokens belong to the next token, those at the end to the last. Other characters
    without a token, or with only the unknown token, are not counted, as they cannot be restored.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    if not len(spans):
        return np.zeros(1, np.int64)
    reached = np.zeros(len(points) + 1, np.int64)
    np.add.at(reached, spans[known, 0], 1)
    np.add.at(reached, spans[known, 1], -1)
    held = (reached.cumsum()[:-1] > 0) | np.isin(points, _SPACES)
    edges = np.concatenate([[0], (sizes * held).cumsum()])
    counts = edges[np.maximum.accumulate(spans[:, 1])]
    counts[-1] = edges[-1]
    return np.append(np.diff(counts, prepend=0), 0)
