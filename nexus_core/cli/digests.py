"""Digest tensors on the device, without syncing: every bit and its position counts.

Tensors are read as 64-bit words. A word at position `i` contributes `word * u[i] + (word >> 32) *
v[i]` modulo 2^64, with odd pseudo-random weights: any change of one number is detected, and a swap
of two is missed in at most one of 2^30 cases. The digest is a sum, so the digest of a whole is the
sum over its parts, each at its position: ranks that hold shards of a tensor add up theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_core.processes import Ranks, is_sharded, local_part, whole

__all__ = ["Digester", "Piece", "hexadecimal"]

Piece = tuple[Tensor, int]
"""A tensor, and its byte offset in the whole."""

WORD = 8  # bytes
PLACE = 16  # bytes: where the next tensor of a group may begin
BLOCK = 1 << 15  # words with their own weights; a block multiplies them by its own factor
SLICE = 64  # blocks read at once
ROWS = 1 << 15  # blocks with their own factor
SMALL = 1 << 16  # bytes; smaller tensors are joined with their neighbours


class Digester:
    """Digests tensors of any device, dtype and layout; keeps the weights on each device."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(
        self, groups: Sequence[Sequence[Tensor]], device: torch.device, ranks: Ranks | None = None
    ) -> Tensor:
        """The digest of each group of tensors, one after the other, as an int64 vector `(groups)`.

        Args:
            groups: the tensors of each group.
            device: device of the result.
            ranks: processes that each hold a shard of divided tensors; then all must call this, and
                all get the digest of the whole, as one process would.
        """
        if not groups:
            return torch.zeros(0, dtype=torch.int64, device=device)
        divided = ranks is not None and any(is_sharded(t) for tensors in groups for t in tensors)
        counts = not divided or ranks is None or ranks.is_main  # replicated tensors count once
        own = torch.stack([self.total(laid_out(group, counts), device) for group in groups])
        return ranks.sum(own) if divided and ranks is not None else own

    @torch.no_grad()
    def total(self, pieces: Iterable[Piece], device: torch.device) -> Tensor:
        """The digest of pieces of one whole: a 0-d int64.

        Args:
            pieces: with their offsets.
            device: device of the result.
        """
        total: Tensor | None = None
        for words, start in _joined(pieces):
            for value in self._of(words, start):
                value = value.to(device, non_blocking=True)
                total = value if total is None else total + value
        return torch.zeros((), dtype=torch.int64, device=device) if total is None else total

    def _of(self, words: Tensor, start: int) -> Iterator[Tensor]:
        """Partial sums over words from an offset (in words); their sum is the digest."""
        low, high, rows = self._weights(words.device)
        at = 0
        while at < len(words):
            row, column = divmod(start + at, BLOCK)
            if column or len(words) - at < BLOCK:
                end = at + min(BLOCK - column, len(words) - at)
                part, here = words[at:end], slice(column, column + end - at)
                value = _dot(part, low[here]) + _dot(part >> 32, high[here])
                value = value * rows[row % ROWS] if row else value  # the first factor is 1
            else:
                count = min(SLICE, (len(words) - at) // BLOCK, ROWS - row % ROWS)
                end = at + count * BLOCK
                block = words[at:end].view(count, BLOCK)
                values = _product(block, low) + _product(block >> 32, high)
                value = _dot(values, rows[row % ROWS : row % ROWS + count])
            yield value * (2 * (row // ROWS) + 1) if row >= ROWS else value
            at = end

    def _weights(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            numbers = torch.from_numpy(_odd(2 * BLOCK + ROWS))
            numbers[2 * BLOCK] = 1
            numbers = numbers.to(device)
            self._tables[device] = numbers[:BLOCK], numbers[BLOCK : 2 * BLOCK], numbers[2 * BLOCK :]
        return self._tables[device]


def laid_out(tensors: Iterable[Tensor], counts: bool = True) -> Iterator[Piece]:
    """Lay tensors out one after another, each at an offset aligned for any dtype.

    Args:
        tensors: for divided ones, this rank's rows.
        counts: whether this rank counts the tensors that are not divided.
    """
    start = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if is_sharded(tensor):
            yield from _own_rows(tensor, start, counts)
        elif counts:
            yield tensor, start
        start += math.ceil(size / PLACE) * PLACE


def _own_rows(tensor: Any, start: int, counts: bool) -> Iterator[Piece]:
    """This rank's rows of a tensor divided by rows; any other tensor whole, if it counts here.

    Every rank decides alike, as they gather the tensor if it is not divided by rows.
    """
    if tensor.device_mesh.ndim == 1 and all(part.is_shard(0) for part in tensor.placements):
        chunks = tensor.__create_chunk_list__()
        row = math.prod(tensor.shape[1:]) * tensor.element_size()
        yield local_part(tensor), start + (chunks[0].offsets[0] if chunks else 0) * row
        return
    everything = whole(tensor)
    if counts:
        yield everything, start


def hexadecimal(number: int) -> str:
    """A digest read from the device, as 16 hex digits."""
    return f"{number % 2**64:016x}"


def _joined(pieces: Iterable[Piece]) -> Iterator[tuple[Tensor, int]]:
    """Pieces as words with their offsets; small neighbours are merged."""
    waiting: list[Tensor] = []
    begin = end = 0
    for tensor, start in pieces:
        flat = tensor.reshape(-1)
        size = flat.numel() * flat.element_size()
        if not size:
            continue
        fits = waiting and start == end and flat.dtype is waiting[0].dtype
        if waiting and not (fits and flat.device == waiting[0].device and size <= SMALL):
            yield _words(torch.cat(waiting), begin), begin // WORD
            waiting = []
        if size > SMALL:
            yield _words(flat, start), start // WORD
            continue
        begin = begin if waiting else start
        waiting.append(flat)
        if rest := -(start + size) % PLACE:
            waiting.append(flat.new_zeros(rest // flat.element_size()))
        end = start + size + rest
    if waiting:
        yield _words(torch.cat(waiting), begin), begin // WORD


def _words(flat: Tensor, start: int) -> Tensor:
    """The bits of a 1-d tensor as int64, zero-padded to whole words."""
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    if size == 1 and flat.dtype is not torch.uint8:
        flat = flat.view(torch.uint8)
    before, after = start % WORD // size, -(start + len(flat) * size) % WORD // size
    aligned = flat.is_contiguous() and flat.storage_offset() * size % WORD == 0
    if before or after:
        flat = torch.cat([flat.new_zeros(before), flat, flat.new_zeros(after)])
    elif not aligned:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.int64)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return torch.dot(one, other) if one.device.type == "cpu" else (one * other).sum()


def _product(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.mv(rows, weights) if rows.device.type == "cpu" else (rows * weights).sum(1)


def _odd(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Odd pseudo-random numbers, the same on every machine (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31)) | np.uint64(1)).view(np.int64)
