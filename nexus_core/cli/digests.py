"""One digest for tensors: of every bit and its place, on the device, without waiting for it.

Tensors are read as words of 64 bits. A word at place `i` counts `word * u[i] + (word >> 32) * v[i]`
modulo 2^64, with odd weights that look random: any change of one number is seen, and an exchange
of two is missed in one of 2^30 cases at most. The digest is a sum, so that of a whole is the sum of
those of its parts, each at its place: processes that hold a part of a tensor each add up theirs.
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
"""A tensor, and the byte at which it begins in the whole."""

WORD = 8  # bytes
PLACE = 16  # bytes: where the next tensor of a group may begin
BLOCK = 1 << 15  # words that have weights of their own; those of a block are multiplied by its own
SLICE = 64  # blocks that are read at once
ROWS = 1 << 15  # blocks with a factor of their own
SMALL = 1 << 16  # bytes of a tensor that is joined with its neighbours before it is read


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
            groups: the tensors of each.
            device: of the answer.
            ranks: of the processes that hold a part each of divided tensors; then all must call,
                and all get the digests of the whole, which are those of one process.
        """
        if not groups:
            return torch.zeros(0, dtype=torch.int64, device=device)
        divided = ranks is not None and any(is_sharded(t) for tensors in groups for t in tensors)
        counts = not divided or ranks is None or ranks.is_main  # what all hold, one adds
        own = torch.stack([self.total(laid_out(group, counts), device) for group in groups])
        return ranks.sum(own) if divided and ranks is not None else own

    @torch.no_grad()
    def total(self, pieces: Iterable[Piece], device: torch.device) -> Tensor:
        """The digest of pieces of one whole: a 0-d int64.

        Args:
            pieces: with their places.
            device: of the answer.
        """
        total: Tensor | None = None
        for words, start in _joined(pieces):
            for value in self._of(words, start):
                value = value.to(device, non_blocking=True)
                total = value if total is None else total + value
        return torch.zeros((), dtype=torch.int64, device=device) if total is None else total

    def _of(self, words: Tensor, start: int) -> Iterator[Tensor]:
        """Sums over words that begin at a place, in words; all of them together are the digest."""
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
    """Tensors one after the other, each at a place that any dtype may begin at.

    Args:
        tensors: of divided ones, this process's rows.
        counts: whether those that are not divided are of this process.
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
    """This process's rows of a tensor that is divided by rows; of another one, all where it counts.

    Every process decides alike, as they exchange the tensor where it is not divided so.
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
    """A digest that was read from the device, as 16 digits."""
    return f"{number % 2**64:016x}"


def _joined(pieces: Iterable[Piece]) -> Iterator[tuple[Tensor, int]]:
    """Pieces as words with their places; small ones that are neighbours become one."""
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
    """The bits of a tensor of one dimension as int64, with zeros up to the next words' ends."""
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
    """Odd numbers that look random, the same everywhere (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31)) | np.uint64(1)).view(np.int64)
