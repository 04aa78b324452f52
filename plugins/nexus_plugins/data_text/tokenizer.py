"""Tokenizers: text to ids and back, and the bytes of text that each id stands for."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_core.errors import DataError

__all__ = [
    "Byte256Tokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Encoded",
    "IdTokenizer",
    "Tokenizer",
    "loss_of",
]

Ids = NDArray[np.int64]
_TOGETHER = 1 << 20  # bytes encoded at once
_COMPARED = 32  # documents per few megabytes of text


@dataclass(frozen=True)
class Encoded:
    """Documents as ids.

    Args:
        ids: all documents concatenated, each with its eos.
        lengths: `(documents,)`, number of ids of each.
        token_bytes: bytes of text of each id, if there is no table.
        lost_bytes: bytes of text without an id, or only the unknown token.
    """

    ids: NDArray[Any]
    lengths: Ids
    token_bytes: Ids | None
    lost_bytes: int = 0


class Tokenizer(ABC):
    """Determines the vocabulary of a run; equal hashes mean equal ids.

    Args of every kind: `size` (ids are below it), `eos` (ends a document; None where the ids
    already mark it), `pad` (fills rows; its labels never count), `bos`.
    """

    kind: str
    size: int
    eos: int | None
    pad: int
    bos: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""

    @abstractmethod
    def to_json(self) -> str:
        """Serialize the tokenizer as text; `load_tokenizer` reads it from a file."""

    def encode_documents(self, texts: Sequence[bytes]) -> Encoded:
        """The ids of many documents of valid UTF-8, each followed by eos."""
        raise DataError(
            f"the {self} cannot encode text; set data_text.tokenizer to a tokenizer.json or bytes"
        )

    def text_bytes(self, ids: Ids) -> bytes:
        """The UTF-8 bytes of some ids; partial characters stay partial."""
        return self.decode(ids.tolist()).encode()

    @property
    def token_bytes(self) -> Ids | None:
        """Bytes of text that each id stands for, `(V,)`; None if that depends on context."""
        return None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of `to_json`, independent of its formatting."""
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.kind} tokenizer of {self.size:,} ids, hash {self.hash[:12]}"


def loss_of(tokenizer: Tokenizer, texts: Sequence[bytes], encoded: Encoded) -> dict[str, int]:
    """Measure how lossy the tokenizer is, by decoding a few documents.

    Returns:
        `compared` documents, those `altered` (spaces aside), and the bytes that were lost.
    """
    if encoded.token_bytes is None:
        return {"compared": 0, "altered": 0, "lost_bytes": encoded.lost_bytes}
    ends = encoded.lengths.cumsum()
    picked = np.linspace(0, len(texts) - 1, min(len(texts), _COMPARED)).astype(np.int64)
    altered = 0
    for number in dict.fromkeys(picked.tolist()):
        first, last = int(ends[number] - encoded.lengths[number]), int(ends[number]) - 1
        back = tokenizer.decode(encoded.ids[first:last].tolist())
        altered += "".join(back.split()) != "".join(texts[number].decode().split())
    return {"compared": len(picked), "altered": altered, "lost_bytes": encoded.lost_bytes}


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, then eos 256, pad 257, bos 258."""

    kind = "bytes"
    size = 259
    eos = 256
    pad = 257
    bos: int | None = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"nexus_tokenizer": self.kind, "size": self.size})

    def encode_documents(self, texts: Sequence[bytes]) -> Encoded:
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
        ids = np.empty(int(lengths.sum()), np.uint16)
        at = first = 0
        for last, end in enumerate(lengths.cumsum().tolist(), 1):
            if end - at >= _TOGETHER or last == len(texts):
                self._encode(texts[first:last], ids[at:end])
                at, first = end, last
        return Encoded(ids, lengths, None, self._lost(texts))

    def _lost(self, texts: Sequence[bytes]) -> int:
        """Bytes without an id."""
        return 0

    def _encode(self, texts: Sequence[bytes], out: NDArray[np.uint16]) -> None:
        if len(texts) == 1:  # it may be long, so it is not copied
            out[:-1] = np.frombuffer(texts[0], np.uint8)
            out[-1] = self.eos
            return
        joined = b"\xff".join([*texts, b""])  # a byte that never occurs in UTF-8
        out[:] = np.frombuffer(joined, np.uint8)
        out[out == 0xFF] = self.eos

    def text_bytes(self, ids: Ids) -> bytes:
        return ids[ids < 256].astype(np.uint8).tobytes()

    @property
    def token_bytes(self) -> Ids:
        return (np.arange(self.size) < 256).astype(np.int64)


class Byte256Tokenizer(ByteTokenizer):
    """One id per UTF-8 byte and no others: byte 0, which text does not use, is eos and pad."""

    kind = "bytes256"
    size = 256
    eos = 0
    pad = 0
    bos = None

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token).decode("utf-8", "replace")

    def text_bytes(self, ids: Ids) -> bytes:
        return ids[ids > 0].astype(np.uint8).tobytes()

    @property
    def token_bytes(self) -> Ids:
        return (np.arange(self.size) > 0).astype(np.int64)

    def _lost(self, texts: Sequence[bytes]) -> int:
        return sum(text.count(0) for text in texts)


class IdTokenizer(Tokenizer):
    """A stand-in for an unknown tokenizer: ids are given, and decode to their numbers."""

    kind = "unknown"
    eos = None
    pad = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split() if word.isdecimal() and int(word) < self.size]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def to_json(self) -> str:
        return json.dumps({"nexus_tokenizer": "ids", "size": self.size})


class CharTokenizer(Tokenizer):
    """One id per character, as in nanoGPT's character corpora; documents are not marked.

    Args:
        letters: character of each id.
    """

    kind = "characters"
    eos = None
    pad = 0

    def __init__(self, letters: Sequence[str]) -> None:
        self._letters = tuple(letters)
        self._ids = {letter: number for number, letter in enumerate(letters)}
        self.size = len(letters)

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise DataError(f"the {self} has no id for {', '.join(map(repr, unknown))}")
        return [self._ids[letter] for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._letters[token] for token in ids)

    def to_json(self) -> str:
        return json.dumps({"nexus_tokenizer": "characters", "letters": self._letters})

    @property
    def token_bytes(self) -> Ids:
        return np.array([len(letter.encode()) for letter in self._letters], np.int64)
