"""The tensor digest: it depends on every bit and position, and is the sum of its parts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexus_core.cli.digests import Digester, hexadecimal

CPU = torch.device("cpu")
DIGEST = Digester()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool,
          torch.complex64]  # fmt: skip


def digest(*tensors: Tensor) -> int:
    return int(DIGEST([tensors], CPU)[0])


def oracle(words: list[int], low: list[int], high: list[int]) -> int:
    """The sum in the module's docstring, in Python integers, for one block."""
    total = sum(w * u + (w >> 32) * v for w, u, v in zip(words, low, high, strict=False))
    return (total + 2**63) % 2**64 - 2**63


def test_it_is_the_sum_that_the_page_says() -> None:
    words = torch.randint(-(2**62), 2**62, (20000,))
    low, high, rows = (table.tolist() for table in DIGEST._weights(CPU))
    first = oracle(words.tolist(), low, high)
    assert digest(words) == (first * rows[0] + 2**63) % 2**64 - 2**63
    assert all(w % 2 for table in (low, high, rows) for w in table)


@settings(max_examples=15)
@given(size=st.sampled_from([1, 2, 7, 1000, 70_000]), place=st.integers(0, 10**9),
       bit=st.integers(0, 31))  # fmt: skip
def test_every_bit_counts(size: int, place: int, bit: int) -> None:
    values = torch.zeros(size).normal_(generator=torch.Generator().manual_seed(size))
    changed = values.clone()
    word = 1 << bit if bit < 31 else -(1 << 31)
    changed.view(torch.int32)[place % size] ^= word
    assert digest(values) != digest(changed)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_exchanged_numbers_are_seen(one: int, other: int) -> None:
    """Powers of two are the hardest: they differ in few high bits."""
    values = 2.0 ** (torch.arange(90_000) % 40)
    one, other = one % len(values), other % len(values)
    changed = values.clone()
    changed[one], changed[other] = values[other], values[one]
    assert (digest(values) == digest(changed)) == torch.equal(values, changed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_is_read_to_the_bit(dtype: torch.dtype) -> None:
    values = torch.arange(300).remainder(2).to(dtype)
    changed = values.clone()
    changed[[3, 4]] = values[[4, 3]]
    assert digest(values) != digest(changed)
    assert digest(values) == digest(values.clone())
    assert digest(torch.stack([values, values], 1)[:, 1]) == digest(values), "a view with strides"


@settings(max_examples=15)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=4), st.sampled_from(DTYPES[:5]))
def test_parts_add_up_to_the_whole(cuts: list[int], dtype: torch.dtype) -> None:
    values = torch.arange(200_000).remainder(251).to(dtype)
    size = values.element_size()
    edges = sorted({0, *cuts, len(values)})
    parts = [int(DIGEST.total([(values[a:b], a * size)], CPU)) for a, b in pairwise(edges)]
    assert sum(parts) % 2**64 == digest(values) % 2**64


def test_small_tensors_are_those_of_a_group_wherever_they_lie() -> None:
    tensors = [torch.randn(n) for n in (1, 3, 8, 20_000, 5)]
    together = digest(*tensors)
    start, total = 0, 0
    for tensor in tensors:
        total += int(DIGEST.total([(tensor, start)], CPU))
        start += (tensor.numel() * 4 + 15) // 16 * 16
    assert total % 2**64 == together % 2**64
    assert digest(*reversed(tensors)) != together
    assert digest() == digest(torch.empty(0)) == 0
    assert hexadecimal(-1) == "f" * 16
