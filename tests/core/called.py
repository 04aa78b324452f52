"""Objects that test settings name by import path: `called:next_id`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_LABEL = -100


class Rows:
    """Samples of `input_ids` and `labels` `(8,)`; some have fewer labels."""

    def __init__(self, count: int, first: int = 0) -> None:
        generator = torch.Generator().manual_seed(7 + first)
        self.ids = torch.randint(13, (count, 9), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index][1:].clone()
        labels[len(labels) - index % 3 :] = NO_LABEL
        return {"input_ids": self.ids[index][:-1], "labels": labels}


class Pairs(Rows):
    """Samples of two answers, each as one of `Rows`."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sides = {"chosen": index, "rejected": (index + 1) % len(self)}
        found = {side: super(Pairs, self).__getitem__(i) for side, i in sides.items()}
        return {f"{side}_{name}": v for side, one in found.items() for name, v in one.items()}


def pairs(train: int = 24, valid: int = 8) -> tuple[Pairs, Pairs]:
    return Pairs(train), Pairs(valid, first=1)


def text(train: int = 24, valid: int = 8) -> tuple[Rows, Rows]:
    return Rows(train), Rows(valid, first=1)


def next_id(output: Any, batch: dict[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """The cross-entropy summed over labels, from logits or hidden states."""
    if hasattr(output, "head_weight"):
        output = output.hidden @ output.head_weight.T
    return F.cross_entropy(
        output.flatten(0, 1), batch["labels"].flatten(), reduction="sum", label_smoothing=smoothing
    )


def mean_next_id(output: Tensor, target: Tensor, ignore_index: int = NO_LABEL) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=ignore_index)


def labels(target: Tensor) -> Tensor:
    return (target != NO_LABEL).sum()


def hits(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The number of correct predictions, and of labels."""
    return (output.argmax(-1) == target).sum(), labels(target)


class Net(nn.Module):
    """Classifies points of the plane into two classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


def points(count: int = 50) -> list[tuple[Tensor, Tensor]]:
    """Samples `(x, y)`; the class is the sign of the first coordinate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator)
    return [(row, (row[0] > 0).long()) for row in x]


def batches(sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the given numbers of points."""
    samples = points(sum(sizes))
    for size in sizes:
        part, samples = samples[:size], samples[size:]
        yield torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])


def both(sizes: list[int]) -> tuple[list[Any], list[Any]]:
    return list(batches(sizes)), list(batches([4]))


def right(output: Tensor, target: Tensor) -> Tensor:
    """For each row, whether its class is correct."""
    return output.argmax(1) == target


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return right(output, target).float().mean()


def pair(output: Tensor, target: Tensor, scale: float = 1.0) -> tuple[Tensor, float]:
    return right(output, target).sum() * scale, float(len(target))


def word(output: Tensor, target: Tensor) -> str:
    return "good"


def reconstruction(output: Tensor, batch: Tensor) -> Tensor:
    return (output - batch).square().sum()


def summed(samples: list[int], offset: int = 0) -> Tensor:
    return torch.tensor(sum(samples) + offset)


def of_model(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr)
