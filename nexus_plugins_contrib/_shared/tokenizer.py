"""Hugging Face tokenizers as the codec of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_core import ConfigError, DataError
from nexus_plugins._shared.paths import expanded, reason

try:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
except ImportError as error:
    raise ConfigError(
        "this plugin needs the package transformers: pip install 'nexus-trainer[hf]'"
    ) from error

__all__ = ["HubTokenizer", "open_tokenizer"]

_PROBE = "The quick  brown fox, 12.5% of N\u00e4he \u2014 \u6771\u4eac \U0001f600\n\tEnd"


class HubTokenizer:
    """Encodes text and conversations as ids.

    Attributes:
        inner: the tokenizer from `transformers`; it must provide token offsets.
        size: ids are below it.
        eos: ends a document.
        pad: fills rows; its labels are ignored.

    Args:
        inner: as the attribute.
        where: the name it was opened by, for messages.

    Raises:
        DataError: it has no eos, or provides no offsets.
    """

    def __init__(self, inner: Any, where: str) -> None:
        if not inner.is_fast:
            raise DataError(
                f"the tokenizer {where} does not map tokens to text; use one with a tokenizer.json"
            )
        if inner.eos_token_id is None:
            raise DataError(
                f"the tokenizer {where} has no eos_token; set it in its tokenizer_config.json"
            )
        self.inner = inner
        self.where = where
        self.size = max(inner.get_vocab().values()) + 1
        self.eos: int = inner.eos_token_id
        self.pad: int = self.eos if inner.pad_token_id is None else inner.pad_token_id

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        ids: list[int] = self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, special tokens by their names."""
        return [self.inner.decode([one]) for one in ids]

    @property
    def has_chat_template(self) -> bool:
        """Whether it has a chat template."""
        return self.inner.chat_template is not None

    def encode_question(self, text: str) -> list[int]:
        """The prompt for an answer to a text, through the chat template, as ids."""
        return self.encode_chat([{"role": "user", "content": text}])

    def encode_chat(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt for the next turn of a conversation, as ids.

        Args:
            turns: each with `role` and `content`.
        """
        asked = self.inner.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=True
        )
        return self.encode(asked)

    def save(self, folder: Path) -> None:
        """Save it with its chat template, for `from_pretrained`."""
        self.inner.save_pretrained(folder)

    @cached_property
    def hash(self) -> str:
        """A hash of all that affects ids: vocabulary, merges, special tokens, chat template."""
        known = [
            json.loads(self.inner.backend_tokenizer.to_str()),
            self.inner.special_tokens_map,
            self.inner.chat_template,
        ]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> NDArray[np.int64] | None:
        """Bytes of text of each id, `(V,)`; 0 for special tokens.

        None if they do not add up to the text, for example if words are normalized or replaced by
        an unknown token.
        """
        counts = np.zeros(self.size, np.int64)
        known = json.loads(self.inner.backend_tokenizer.to_str())
        decoder = json.dumps(known.get("decoder"), ensure_ascii=False)
        added = self.inner.get_added_vocab()
        for piece, number in self.inner.get_vocab().items():
            counts[number] = len(piece.encode()) if piece in added else _bytes_of(piece, decoder)
        counts[self.inner.all_special_ids] = 0
        texts = (_PROBE, _PROBE * 2)
        beyond = {int(counts[self.encode(t)].sum()) - len(t.encode()) for t in texts}
        return counts if beyond in ({0}, {1}) else None  # SentencePiece adds a leading space

    def __str__(self) -> str:
        return f"tokenizer {self.where} of {self.size:,} ids, hash {self.hash[:12]}"


def _bytes_of(piece: str, decoder: str) -> int:
    """The number of bytes of a vocabulary entry after decoding."""
    if '"ByteLevel"' in decoder:
        return len(piece)  # one character per byte
    if '"ByteFallback"' in decoder and len(piece) == 6 and piece.startswith("<0x"):
        return 1
    return len(piece.replace("\u2581", " ").encode())


def open_tokenizer(wish: str, revision: str | None = None) -> HubTokenizer:
    """Open the tokenizer of a folder, a tokenizer.json, or a Hub id (offline from the cache).

    Raises:
        DataError: it cannot be found or used.
    """
    path = expanded(wish)
    fast: Any = PreTrainedTokenizerFast
    try:
        if path.is_file():
            file = json.loads(path.read_text(encoding="utf-8"))
            inner = fast(tokenizer_file=str(path), **_specials(file))
        else:
            place = str(path) if path.is_dir() else wish
            inner = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except Exception as error:  # the package raises exceptions of many kinds, bare ones too
        said = " ".join(reason(error).split())[:300]
        raise DataError(
            f"cannot open the tokenizer '{wish}': {said}; expected a folder with a "
            "tokenizer.json, such a file, or the id of one on the hub (offline: in its cache)"
        ) from error
    return HubTokenizer(inner, wish)


_USUAL = {
    "eos_token": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
}


def _specials(file: dict[str, Any]) -> dict[str, str]:
    """The special tokens of a bare tokenizer.json, by their usual names."""
    added = {token["content"] for token in file.get("added_tokens", [])}
    found = {
        what: next((name for name in names if name in added), None)
        for what, names in _USUAL.items()
    }
    return {what: name for what, name in found.items() if name is not None}
