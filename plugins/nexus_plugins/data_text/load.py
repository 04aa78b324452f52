"""Find the tokenizer of a setting, a folder of prepared data, or an id file."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from nexus_core.errors import DataError
from nexus_plugins._shared.paths import expanded, reason
from nexus_plugins.data_text.huggingface import HfTokenizer
from nexus_plugins.data_text.tokenizer import (
    Byte256Tokenizer,
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
)

__all__ = ["load_tokenizer", "tokenizer_beside"]

_OF_BYTES = {one.kind: one for one in (ByteTokenizer, Byte256Tokenizer)}


def load_tokenizer(
    wish: str, eos_token: str | None = None, pad_token: str | None = None
) -> Tokenizer:
    """The tokenizer of a name or a file.

    Args:
        wish: "bytes", "bytes256", a tokenizer.json (from Hugging Face, or saved by this trainer),
            its folder, or nanoGPT's meta.pkl.
        eos_token, pad_token: names of special tokens; None: the usual ones.

    Raises:
        DataError: the file does not exist, or is not a tokenizer.
    """
    if wish in _OF_BYTES:
        return _OF_BYTES[wish]()
    path = expanded(wish)
    try:
        path = path / "tokenizer.json" if path.is_dir() else path
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"no tokenizer '{wish}' ({reason(error)}); expected \"bytes\", "
            '"bytes256" or the path of a tokenizer.json'
        ) from error
    return _parsed(raw, path, eos_token, pad_token)


@lru_cache(maxsize=8)
def _parsed(raw: bytes, path: Path, eos_token: str | None, pad_token: str | None) -> Tokenizer:
    if path.suffix == ".pkl":
        return _of_nanogpt(raw, path)
    try:
        text = raw.decode("utf-8-sig")
        layout = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error
    own = layout.get("nexus_tokenizer") if isinstance(layout, dict) else None
    if own is not None:
        return _own(own, layout, path)
    return HfTokenizer(text, path, eos_token, pad_token)


def _own(kind: str, layout: dict[str, Any], path: Path) -> Tokenizer:
    size, letters = layout.get("size"), layout.get("letters")
    if kind in _OF_BYTES:
        return _OF_BYTES[kind]()
    if kind == "ids" and isinstance(size, int) and 0 < size <= _MOST_IDS:
        return IdTokenizer(size)
    if kind == "characters" and isinstance(letters, list):
        return CharTokenizer(_letters(letters, path))
    raise DataError(f"{path} has a tokenizer of unknown kind '{kind}'; use a newer release")


def _letters(found: list[Any], path: Path) -> list[str]:
    """Check that all texts are distinct and can be encoded as UTF-8."""
    try:
        "".join(found).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} has ids without text ({error})") from error
    if len(set(found)) < len(found) or not found:
        raise DataError(f"{path} has no ids, or two for the same text")
    return found


def tokenizer_beside(path: Path) -> Path | None:
    """The tokenizer file next to a .bin file, if there is one."""
    beside = (path.parent / name for name in ("tokenizer.json", "meta.pkl"))
    return next((file for file in beside if file.exists()), None)


_MOST_IDS = 1 << 32


class _Plain(pickle.Unpickler):
    """Unpickles numbers, strings and containers; rejects anything that could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it loads {module}.{name}")


def _of_nanogpt(raw: bytes, path: Path) -> Tokenizer:
    """The characters of nanoGPT's meta.pkl: {"vocab_size": V, "itos": {id: character}}."""
    try:
        _check_memo(raw)
        meta = _Plain(io.BytesIO(raw)).load()
        letters = [meta["itos"][number] for number in range(int(meta["vocab_size"]))]
    except (
        pickle.UnpicklingError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        EOFError,
        AttributeError,
        ImportError,
        OverflowError,
        MemoryError,
        RecursionError,
        struct.error,
    ) as error:
        raise DataError(
            f"{path} is not the meta.pkl of a character corpus ({error!r:.200}); set "
            "data_text.tokenizer to the tokenizer of the ids"
        ) from error
    return CharTokenizer(_letters(letters, path))


def _check_memo(raw: bytes) -> None:
    """Reject memo indices that are only meant to exhaust memory."""
    for opcode, value, _ in pickletools.genops(raw):
        puts = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if puts and not 0 <= int(value or 0) <= len(raw):
            raise pickle.UnpicklingError(f"it requests {value:,} memo cells")
