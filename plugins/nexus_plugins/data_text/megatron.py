"""The .bin and .idx of Megatron-LM's `preprocess_data.py`, also written by NeMo and GPT-NeoX.

NAME.idx, little-endian: "MMIDIDX\\0\\0", version 1 (uint64), the id dtype (uint8), number of
sequences (uint64) and of document boundaries (uint64), then the sequences' lengths (int32) and byte
offsets (int64), and the indices of the sequences at which documents begin, plus the total (int64).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from nexus_core.errors import DataError
from nexus_plugins._shared.cache import cached, fingerprint, signature
from nexus_plugins.data_text.stream import MappedFile

__all__ = ["MEGATRON", "open_megatron"]

MEGATRON = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_KINDS = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_PORTION = 1 << 20


def open_megatron(path: Path, index: Path, cache: Path) -> tuple[MappedFile, MappedFile, int]:
    """The ids, where documents begin, and the highest id.

    Raises:
        DataError: the files are damaged or do not match.
    """
    raw = MappedFile(index).array
    if len(raw) < _HEADER.size:
        raise DataError(f"{index} is truncated; {_AGAIN}")
    _, version, kind, sequences, edges = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if version != 1 or kind not in _KINDS:
        raise DataError(
            f"{index} has version {version} with ids of kind {kind}; known: version 1 with "
            f"kinds {', '.join(map(str, _KINDS))}"
        )
    expected = _HEADER.size + 12 * sequences + 8 * edges
    if len(raw) < expected or edges < 1:
        raise DataError(
            f"{index} is truncated: {len(raw):,} bytes instead of {expected:,}; {_AGAIN}"
        )
    ids = MappedFile(path, _KINDS[kind])
    lengths = MappedFile(index, "i4", _HEADER.size, sequences)
    offsets = MappedFile(index, "i8", _HEADER.size + 4 * sequences, sequences)
    firsts = MappedFile(index, "i8", _HEADER.size + 12 * sequences, edges)

    def build(folder: Path) -> None:
        starts = _starts(path, index, ids, lengths, offsets, firsts)
        starts.astype("<i8").tofile(folder / "starts")
        ends = [0, 0]
        for first in range(0, len(ids.array), _PORTION):
            portion = ids.array[first : first + _PORTION]
            ends = [min(ends[0], int(portion.min())), max(ends[1], int(portion.max()))]
        if ends[0] < 0:
            raise DataError(f"{path} has the negative id {ends[0]}; {_AGAIN}")
        (folder / "scan.json").write_text(json.dumps({"highest": ends[1]}))

    key = fingerprint("megatron", signature([path, index], changes=True))
    folder = cached(cache, f"ids-{key}", build)
    highest = json.loads((folder / "scan.json").read_text())["highest"]
    return ids, MappedFile(folder / "starts", "i8"), int(highest)


def _starts(
    path: Path,
    index: Path,
    ids: MappedFile,
    lengths: MappedFile,
    offsets: MappedFile,
    firsts: MappedFile,
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where each document begins, and the number of ids."""
    sizes = lengths.array.astype(np.int64)
    begins = np.concatenate([[0], sizes.cumsum()])
    width = ids.dtype.itemsize
    if (sizes < 0).any() or not np.array_equal(offsets.array, begins[:-1] * width):
        raise DataError(f"{index}: its sequences are not contiguous; {_AGAIN}")
    if int(begins[-1]) * width != path.stat().st_size:
        raise DataError(
            f"{path} has {path.stat().st_size:,} bytes, but its .idx says "
            f"{int(begins[-1]) * width:,}; copy both again"
        )
    edges = firsts.array
    ends_right = int(edges[0]) == 0 and int(edges[-1]) == len(sizes)
    if not ends_right or (edges[1:] < edges[:-1]).any():
        raise DataError(f"{index}: its document offsets decrease; {_AGAIN}")
    starts: np.ndarray[tuple[int], np.dtype[np.int64]] = np.unique(begins[edges])
    return starts


_AGAIN = "write both files again, or copy them again"
