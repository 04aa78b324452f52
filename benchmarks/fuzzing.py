"""Shared by `benchmarks.fuzz` and the tests: targets, and ways to damage valid input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

__all__ = ["Input", "Target", "damaged", "write"]

Input = dict[str, bytes]
"""The files of an input, by name."""

_NUMBERS = [
    value.to_bytes(size, order, signed=False)
    for size in (1, 2, 4, 8)
    for value in (0, 1, (1 << (8 * size - 1)) - 1, 1 << (8 * size - 1), (1 << (8 * size)) - 1)
    for order in ("little", "big")
]
_WORDS = [b"\n", b"\r\n", b'"', b"{", b"}", b"[", b"]", b"null", b"\xff", b"\xef\xbb\xbf", b"\0",
          b"1e999", b"-1", b"NaN", b"\\ud800", b"\xed\xa0\x80", b"text", b"\x1b[31m", b"%s", b"~",
          b"9" * 400]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader of files from users or other programs.

    Args:
        seeds: creates valid inputs, of which one file is damaged.
        read: reads the folder of a damaged input; it must return or raise a `NexusError`.
        pack: compresses a file's content, by suffix: half of the time, the content is damaged
            instead of the compressed bytes.
    """

    seeds: Callable[[], list[Input]]
    read: Callable[[Path], object]
    pack: Callable[[str, bytes], bytes] = lambda name, raw: raw


def damaged(target: Target, seeds: list[Input], random: Random) -> Input:
    """One of the inputs, with one of its files modified, truncated or replaced."""
    found = dict(random.choice(seeds))
    name = random.choice(sorted(found))
    within = random.random() < 0.5
    files = {key: raw if within else target.pack(key, raw) for key, raw in found.items()}
    other = random.choice(seeds).get(name, b"")
    files[name] = _damage(files[name], other, random)
    return {key: target.pack(key, raw) if within else raw for key, raw in files.items()}


def _damage(raw: bytes, other: bytes, random: Random) -> bytes:
    if random.random() < 0.05:
        return random.randbytes(random.choice([0, 1, 2, 7, 64, 1000]))
    changed = bytearray(raw)
    for _ in range(random.choice([1, 1, 1, 2, 3, 8])):
        random.choice(_CHANGES)(changed, other, random)
    return bytes(changed)


def _flip(raw: bytearray, _other: bytes, random: Random) -> None:
    if raw:
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)


def _cut(raw: bytearray, _other: bytes, random: Random) -> None:
    del raw[random.randrange(len(raw) + 1) :]


def _remove(raw: bytearray, _other: bytes, random: Random) -> None:
    begin = random.randrange(len(raw) + 1)
    del raw[begin : begin + random.choice([1, 2, 4, 30])]


def _repeat(raw: bytearray, _other: bytes, random: Random) -> None:
    begin = random.randrange(len(raw) + 1)
    piece = raw[begin : begin + random.choice([1, 8, 100])]
    raw[begin:begin] = piece * random.choice([1, 2, 50])


def _number(raw: bytearray, _other: bytes, random: Random) -> None:
    begin = random.randrange(len(raw) + 1)
    number = random.choice(_NUMBERS)
    raw[begin : begin + len(number)] = number


def _insert(raw: bytearray, _other: bytes, random: Random) -> None:
    begin = random.randrange(len(raw) + 1)
    raw[begin:begin] = random.choice(_WORDS)


def _noise(raw: bytearray, _other: bytes, random: Random) -> None:
    begin = random.randrange(len(raw) + 1)
    raw[begin : begin + 8] = random.randbytes(8)


def _splice(raw: bytearray, other: bytes, random: Random) -> None:
    begin, end = random.randrange(len(raw) + 1), random.randrange(len(other) + 1)
    raw[begin:] = other[end:]


_CHANGES = (_flip, _flip, _cut, _remove, _repeat, _number, _number, _insert, _noise, _splice)


def write(files: Input, folder: Path) -> int:
    """Write an input to a folder; returns its size in bytes."""
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return sum(map(len, files.values()))
