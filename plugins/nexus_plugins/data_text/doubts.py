"""Check whether a file without a format marker plausibly holds uint16 ids.

Wider ids, ids of the other byte order, floats and archives can all be read as uint16, and a model
would train on the result without an error. Each test below detects one of these, and its
false-positive rate on real text ids is below one in a million.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_plugins.data_text.stream import MappedFile

__all__ = ["doubts"]

_BLOCKS, _BLOCK = 8, 1 << 15  # bytes sampled
_SIGNS = 20  # 2**-20 is one in a million
_WIDE = 15  # largest upper half of a 32-bit id: vocabularies up to a million
_LARGE = 1 << 12
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive, such as torch.save writes",
    b"\x1f\x8b\x08": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh9": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x80\x02\x8a\x0a": "a pickle of torch.save",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x05\x95": "a pickle",
    b"GGUF": "a model in GGUF",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x89HDF": "HDF5",
    b"SQLite": "a database",
    b"%PDF": "a PDF",
    b"NEXUSIDX": "the index of other ids",
    b"MMIDIDX": "an index of Megatron",
}

Bytes = NDArray[np.uint8]


def doubts(path: Path) -> str | None:
    """Why a file's content is not accepted as uint16 ids, with advice; None if it is."""
    sample = _sample(MappedFile(path).array)
    head = sample[:16].tobytes()
    archive = next((what for magic, what in _ARCHIVES.items() if head.startswith(magic)), None)
    if head[8:10] == b'{"' and head[5:8] == b"\0\0\0":
        archive = "a model in safetensors"
    if archive is not None:
        return f"it is {archive}; name the id files"
    kind, dtype = _kind(sample)
    if kind is None:
        return None
    if dtype is None:
        return f"it holds {kind}; write the ids as integers, or set data_text.ids_dtype=uint16"
    return (
        f"it holds {kind}; set data_text.ids_dtype={dtype}, or to uint16 if the ids really are "
        "uint16"
    )


def _sample(raw: Bytes) -> Bytes:
    """A small file, or blocks of a large one, at multiples of 8 bytes."""
    if len(raw) <= _BLOCKS * _BLOCK:
        return raw[: len(raw) // 2 * 2]
    begins = np.linspace(0, len(raw) - _BLOCK, _BLOCKS).astype(np.int64) // 8 * 8
    return np.concatenate([raw[begin : begin + _BLOCK] for begin in begins.tolist()])


def _kind(raw: Bytes) -> tuple[str | None, str | None]:
    """What the bytes are if not 16-bit ids, and the dtype to read them with."""
    words = raw.view("<u2")
    if len(words) >= 64 and not words.any():
        return "nothing but zeros", None
    if len(raw) >= 64 and _is_text(raw):
        return "text", None
    if _is_wide(words):
        zeros = len(words) % 4 == 0 and not words[2::4].any()
        return ("64-bit ids", "int64") if zeros else ("32-bit ids", "uint32")
    if _is_wide(words.byteswap()[: len(words) // 2 * 2][::-1]):
        return "32-bit ids in the other byte order", "uint32be"
    if len(words) >= 32 and _is_float(raw):
        return "floating-point numbers", None
    if _is_swapped(raw):
        return "ids in the other byte order", "uint16be"
    return None, None


def _is_text(raw: Bytes) -> bool:
    control = (raw < 32) & (raw != 9) & (raw != 10) & (raw != 13)
    return not control.any() and not (raw == 127).any() and float((raw < 127).mean()) > 0.9


def _is_wide(words: NDArray[Any]) -> bool:
    """Whether every second number is zero, or tiny while the others are large.

    If both had the same distribution, each value larger than all second numbers would be in a first
    position with probability one half. Each value counts once, as a frequent one proves nothing.
    """
    low, high = words[: len(words) // 2 * 2 : 2], words[1::2]
    if not len(high) or (most := int(high.max())) > _WIDE:
        return False
    if most == 0:
        return int((low > 0).sum()) >= _SIGNS
    large = int(low.max()) >= _LARGE  # letters of an alphabet may alternate
    return large and _distinct(low[low > most]) >= _SIGNS


def _is_swapped(raw: Bytes) -> bool:
    """Whether the lower byte of a number varies less than the upper one."""
    low, high = raw[::2], raw[1::2]
    words = raw.view("<u2")
    if _distinct(words[high > low.max()]) >= _SIGNS:
        return True
    return _distinct(words) >= 256 and _entropy(high) > _entropy(low) + 1.0


def _distinct(words: NDArray[Any]) -> int:
    return int((np.bincount(words) > 0).sum())


def _entropy(values: Bytes) -> float:
    shares = np.bincount(values, minlength=256) / len(values)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _is_float(raw: Bytes) -> bool:
    """Whether nearly all numbers have a usual magnitude when read as one of the float dtypes."""
    for bits, width, first, last in (
        (52, "<u8", 1003, 1047),
        (23, "<u4", 107, 150),
        (10, "<u2", 5, 24),
        (7, "<u2", 107, 137),
    ):
        size = np.dtype(width).itemsize
        values = raw[: len(raw) // size * size].view(width)
        values = values[values != 0]
        kinds = 8 * size - 1 - bits
        exponents = (values >> np.asarray(bits, width)) & np.asarray((1 << kinds) - 1, width)
        usual = (exponents >= first) & (exponents <= last)
        if len(values) * size >= len(raw) // 4 and len(values) and float(usual.mean()) >= 0.995:
            return True
    return False
