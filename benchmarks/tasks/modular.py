"""Modular arithmetic: additions and multiplications, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from benchmarks.chains import Chain
from benchmarks.tasks.task import IGNORED, Batch

__all__ = ["TASK", "Modular"]


@dataclass(frozen=True)
class Modular(Chain):
    """Each document is a number and operations, `+ a` or `* a` modulo a prime.

    The label of an operation is the result so far. Sums and products are mixed at random, so their
    order matters. No product is by 0, which would forget what came before.
    """

    name: ClassVar[str] = "modular"

    steps: int = 1600
    modulus: int = 5

    @property
    def vocab_size(self) -> int:
        """A token for each number, each sum and each product."""
        return 3 * self.modulus

    def drawn(self, seed: int, draw: Generator, further: bool) -> Batch:
        """Numbers and operations."""
        count = self.most + 1 if further else self.most
        many = (self.rows, self.documents(1 + count))
        results = [torch.randint(self.modulus, many, generator=draw)]
        tokens = [results[0]]
        for _ in range(count):
            is_product = torch.rand(many, generator=draw) < 0.5
            number = torch.randint(self.modulus, many, generator=draw)
            number = torch.where(is_product, number.clamp_min(1), number)
            result = torch.where(is_product, results[-1] * number, results[-1] + number)
            results.append(result % self.modulus)
            tokens.append(self.modulus * (1 + is_product.long()) + number)
        steps = torch.arange(1 + count)
        labels = torch.stack(results, -1).where(steps == count if further else steps > 0, IGNORED)
        segments = torch.arange(many[1]).repeat_interleave(1 + count)
        return {
            "input_ids": torch.stack(tokens, -1).flatten(1),
            "labels": labels.flatten(1),
            "segment_ids": segments.expand(self.rows, -1),
        }


TASK = Modular
