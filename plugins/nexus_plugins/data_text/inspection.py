"""Inspect data: counts, lengths, samples, and checks beyond those made on reading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus_plugins.data_text.config import DataTextConfig
from nexus_plugins.data_text.dataset import Streams, open_streams
from nexus_plugins.data_text.sources import has_held_out
from nexus_plugins.data_text.stream import Place, Stream
from nexus_plugins.data_text.tokenizer import Tokenizer

__all__ = ["Report", "inspect"]

Ids = NDArray[np.int64]
_PORTION = 1 << 20  # tokens
_SAMPLE = 200  # tokens
_NOTHING = 1e-300  # a share too small to hold out any document


@dataclass(frozen=True)
class Report:
    """The inspection of one stream of documents.

    Args:
        name: "train" or "valid".
        documents, tokens: their counts.
        histogram: `(shortest, longest, documents)` by powers of two of the tokens.
        samples: the beginnings of some documents.
        faults: what is wrong; empty if nothing is.
    """

    name: str
    documents: int
    tokens: int
    histogram: tuple[tuple[int, int, int], ...]
    samples: tuple[tuple[Place, str], ...]
    faults: tuple[str, ...]


def inspect(config: DataTextConfig, samples: int) -> tuple[Streams, list[Report]]:
    """Open the data of `config.train`, including any held-out part, and read all of it.

    Raises:
        DataError: it cannot be opened.
    """
    if config.valid is None and has_held_out(config.train):
        config = config.model_copy(update={"valid_share": _NOTHING})
    streams = open_streams(config)
    found = [("train", one) for one in streams.train.values()]
    found += [("valid", one) for one in streams.valid.values() if len(one)]
    return streams, [_report(*pair, streams.tokenizer, samples) for pair in found]


def _report(name: str, stream: Stream, tokenizer: Tokenizer, samples: int) -> Report:
    picked = np.linspace(0, stream.documents - 1, min(samples, stream.documents)).astype(int)
    return Report(
        name,
        stream.documents,
        len(stream),
        _histogram(stream),
        tuple(_sample(stream, number, tokenizer) for number in picked.tolist()),
        tuple(_faults(stream, tokenizer)),
    )


def _histogram(stream: Stream) -> tuple[tuple[int, int, int], ...]:
    counts = np.zeros(64, np.int64)
    for lengths in stream.document_lengths():
        exponents = np.frexp(lengths.astype(np.float64))[1]  # 1 for 1, 2 for 2 and 3, 3 for 4 to 7
        counts += np.bincount(exponents, minlength=64)
    bins = [((1 << power) >> 1, (1 << power) - 1) for power in range(64)]
    return tuple((*bins[power], int(counts[power])) for power in np.flatnonzero(counts).tolist())


def _sample(stream: Stream, document: int, tokenizer: Tokenizer) -> tuple[Place, str]:
    first, last = stream.span(document)
    ids = np.empty(min(last - first, _SAMPLE), np.int64)
    stream.read(first, first + len(ids), ids)
    return stream.place(first), tokenizer.decode(ids.tolist())


def _faults(stream: Stream, tokenizer: Tokenizer) -> list[str]:
    highest, inside, unended = 0, 0, 0
    for first in range(0, len(stream), _PORTION):
        last = min(first + _PORTION, len(stream))
        ids = np.empty(last - first, np.int64)
        stream.read(first, last, ids)
        highest = max(highest, int(ids.max()))
        if tokenizer.eos is not None:
            starts, _ = stream.starts(np.array([first + 1]), np.array([last]))
            ends = starts - first - 1
            unended += int((ids[ends] != tokenizer.eos).sum())
            inside += int((ids == tokenizer.eos).sum())
    faults = []
    if highest >= tokenizer.size:
        faults.append(f"id {highest} is not in the vocabulary of {tokenizer.size} ids")
    if unended:
        faults.append(f"{unended:,} documents do not end with eos")
    if tokenizer.eos is not None and inside > stream.documents:
        faults.append(f"{inside - stream.documents:,} eos tokens are inside documents")
    return faults
