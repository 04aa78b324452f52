"""Bits per byte of simple compressors: the baselines that a trained model has to beat."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Mapping, Sequence
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

__all__ = ["bigram_bits_per_byte", "compared", "gzip_bits_per_byte", "xz_bits_per_byte"]

_PAIRS = 256 * 256
_SAME = "on the same text (xz and gzip see nothing else)"
_STRENGTHS = 2.0 ** np.arange(-2, 11)


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `gzip -9` (DEFLATE, RFC 1951) on a text, without the header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return 8 * len(packer.compress(text) + packer.flush()) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `xz -9e` (LZMA2) on a text, without the container's header."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return 8 * len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters)) / len(text)


def bigram_bits_per_byte(train: bytes, text: bytes) -> float:
    """Bits per byte of a text under a byte bigram model of the training text.

    P(b | a) = (c(ab) + k P(b)) / (c(a) + k) with P(b) = (c(b) + 1) / (n + 256); k is the best of a
    few on the last tenth of the training text, so nothing is fitted to the evaluated text.

    Source: interpolation with a Dirichlet prior, MacKay and Peto 1995, with one strength for all.
    """
    cut = len(train) * 9 // 10
    counts, held_out = _pairs(train[:cut]), _pairs(train[cut:])
    best = min(_STRENGTHS, key=lambda strength: _bits(counts, held_out, float(strength)))
    measured = _pairs(text)
    return _bits(_pairs(train), measured, float(best)) / max(1, int(measured.sum()))


def compared(reached: float, others: Mapping[str, float]) -> str:
    """Compare a model's bits per byte with the baselines; lower is better.

    Args:
        reached: bits per byte of the model; NaN if unknown.
        others: bits per byte on the same text, by name.
    """
    said = {name: f"{name} {bits:.2f}" for name, bits in sorted(others.items(), key=itemgetter(1))}
    beaten = _listed([said[name] for name in said if others[name] > reached])
    ahead = _listed([said[name] for name in said if others[name] <= reached])
    if not beaten and not ahead:
        return f"{_listed([*said.values()])} bits/byte {_SAME}" if said else ""
    if not beaten:
        return f"{reached:.2f} bits/byte: does not beat {ahead} {_SAME}"
    rest = f", but not {ahead}" if ahead else ""
    return f"{reached:.2f} bits/byte: beats {beaten}{rest}, {_SAME}"


def _listed(items: Sequence[str]) -> str:
    *others, last = items or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _pairs(text: bytes) -> NDArray[np.int64]:
    """How often each byte follows each, `(256, 256)`."""
    numbers = np.frombuffer(text, np.uint8).astype(np.int64)
    return np.bincount(numbers[:-1] * 256 + numbers[1:], minlength=_PAIRS).reshape(256, 256)


def _bits(counts: NDArray[np.int64], measured: NDArray[np.int64], strength: float) -> float:
    single = (counts.sum(axis=0) + 1) / (counts.sum() + 256)
    given = counts.sum(axis=1, keepdims=True)
    probability = (counts + strength * single) / (given + strength)
    return float(-(measured * np.log2(probability)).sum())
