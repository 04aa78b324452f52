"""Puzzles that each need one module of NEXUS, made from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from nexus_plugins.modules.graphs import Graph

__all__ = ["Rows", "Rule", "dynamics", "hops", "noisy", "puzzles"]

Puzzle = dict[str, Tensor]
IGNORED = -100


def dynamics(
    draw: Generator,
    rows: int,
    length: int,
    symbols: int = 12,
    shortest: int = 6,
    longest: int = 12,
    noise: float = 0.0,
) -> Puzzle:
    """Rows that each move along a hidden cycle and emit a symbol at every position.

    Length and symbols of the cycle are drawn for each row. Two positions may have the same symbol,
    so what comes next depends on the position. Once the cycle is inferred, everything but the noise
    is predictable.

    Args:
        draw: the random generator.
        rows: B.
        length: T.
        symbols: number of symbols.
        shortest: minimum length of a cycle.
        longest: maximum length of a cycle.
        noise: share of the tokens that are replaced by random symbols.

    Returns:
        `input_ids`, and `labels`, the next symbols, `(B, T)`.
    """
    lengths = torch.randint(shortest, longest + 1, (rows, 1), generator=draw)
    cycles = torch.randint(symbols, (rows, longest), generator=draw)
    places = torch.arange(length + 1).expand(rows, -1) % lengths
    seen = cycles.gather(1, places)
    is_noise = torch.rand(seen.shape, generator=draw) < noise
    seen = seen.where(~is_noise, torch.randint(symbols, seen.shape, generator=draw))
    return {"input_ids": seen[:, :-1], "labels": seen[:, 1:]}


@dataclass(frozen=True)
class Rule:
    """Which token follows: `sums[(first[the last one] + second[the one before]) % symbols]`.

    Args:
        first: a permutation of the symbols.
        second: another one; None: the token before the last one makes no difference.
        sums: a third one.
    """

    first: Tensor
    second: Tensor | None
    sums: Tensor

    @classmethod
    def drawn(cls, draw: Generator, symbols: int = 8, order: int = 2) -> Rule:
        """A scrambled addition table."""
        first, second, sums = (torch.randperm(symbols, generator=draw) for _ in range(3))
        return cls(first, second if order == 2 else None, sums)

    def sequences(self, draw: Generator, rows: int, length: int) -> Tensor:
        """Sequences `(rows, length)` that start with two random tokens."""
        start = [torch.randint(len(self.sums), (rows,), generator=draw) for _ in range(2)]
        return self.continued(torch.stack(start, 1), length)

    def continued(self, start: Tensor, length: int) -> Tensor:
        """The sequences `(rows, length)` that follow from their first two tokens `(rows, 2)`."""
        tokens = [*start.unbind(1)]
        for _ in range(length - 2):
            before = 0 if self.second is None else self.second[tokens[-2]]
            tokens.append(self.sums[(self.first[tokens[-1]] + before) % len(self.sums)])
        return torch.stack(tokens, 1)


def noisy(draw: Generator, rule: Rule, level: Tensor, length: int, blanks: float = 0.5) -> Puzzle:
    """Sequences that follow a rule, with some tokens replaced; the task is to recover them.

    They can be derived, step by step, from the last two trusted tokens.

    Args:
        draw: the random generator.
        rule: the rule of all sequences.
        level: `(B, 1)` the share of each row's tokens that is replaced.
        length: T.
        blanks: share of the replaced tokens that become blank, a token of its own; the others
            become random symbols.

    Returns:
        `input_ids` and `labels`, the clean tokens, `(B, T)`, and `level`.
    """
    symbols = len(rule.sums)
    labels = rule.sequences(draw, len(level), length)
    is_noise = torch.rand(labels.shape, generator=draw) < level
    noise = torch.randint(symbols, labels.shape, generator=draw)
    is_blank = torch.rand(labels.shape, generator=draw) < blanks
    noise = noise.where(~is_blank, symbols)
    return {"input_ids": torch.where(is_noise, noise, labels), "labels": labels, "level": level}


def hops(
    draw: Generator, rows: int, length: int, places: int = 6, most: int = 3, least: int = 1
) -> Puzzle:
    """Documents that each give a table of jumps, then follow it from one place, jump by jump.

    A document has P lines in random order, each a token that says where one place leads, then a
    place, and then `most` equal tokens, each of which asks for the next place. As each document has
    its own table, none can be memorized.

    Args:
        draw: the random generator.
        rows: B.
        length: maximum T, which is as many documents as fit, at least one.
        places: P.
        most: jumps of a document.
        least: jumps from which answers count.

    Returns:
        `input_ids`, below P * P for lines, then P places and the token that asks; `labels`, the
        places, -100 where none counts; `hops`, how many jumps lead there, 0 where none counts; and
        `segment_ids`, the documents; all `(B, T)`.
    """
    size = places + 1 + most
    many = (rows, max(1, length // size))
    table = torch.randint(places, (*many, places), generator=draw)
    order = torch.rand(table.shape, generator=draw).argsort(-1)
    stops = [torch.randint(places, (*many, 1), generator=draw)]
    for _ in range(most):
        stops.append(table.gather(-1, stops[-1]))
    jumps = torch.arange(1 + most).expand(*many, -1)
    place, counts = places**2 + torch.cat(stops, -1), jumps >= least
    asked = place.where(jumps == 0, places**2 + places)
    nothing = torch.zeros_like(table)
    parts = {
        "input_ids": (order * places + table.gather(-1, order), asked),
        "labels": (nothing + IGNORED, place.where(counts, IGNORED)),
        "hops": (nothing, jumps.where(counts, 0)),
    }
    segments = torch.arange(many[1]).repeat_interleave(size).expand(rows, -1)
    return {key: torch.cat(part, -1).flatten(1) for key, part in parts.items()} | {
        "segment_ids": segments
    }


class Rows(Dataset[dict[str, Puzzle]]):
    """Rows of all puzzles: each index gives one row of every puzzle, by name.

    Args:
        puzzles: by name, all with the same number of rows.
        graph: the graph of the puzzle `graph`.
        samples: `(rows, T)` which samples of the graph are in each row.
    """

    def __init__(self, puzzles: dict[str, Puzzle], graph: Graph, samples: Tensor) -> None:
        self._puzzles, self._graph, self._samples = puzzles, graph, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> dict[str, Puzzle]:
        made = {
            name: {key: value[row] for key, value in puzzle.items()}
            for name, puzzle in self._puzzles.items()
        }
        return {**made, "graph": self._graph.rows(self._samples[row])}


def puzzles(
    rows: int = 4000, held_out: int = 64, length: int = 64, noise: float = 0.7, seed: int = 0
) -> dict[str, Any]:
    """All four puzzles, as training and evaluation data: `dynamics`, `denoising`, `hops`, `graph`.

    Args:
        rows: rows of each puzzle to train on.
        held_out: rows of each puzzle to evaluate on.
        length: tokens per row, for `hops` at most; for `graph` samples.
        noise: maximum level of noise of a row of `denoising`; the levels are uniform from 0.
        seed: determines rules, graph and rows.
    """
    draw = torch.Generator().manual_seed(seed)
    rule, graph = Rule.drawn(draw), Graph(draw)

    def made(count: int) -> Rows:
        level = noise * torch.rand((count, 1), generator=draw)
        return Rows(
            {
                "dynamics": dynamics(draw, count, length),
                "denoising": noisy(draw, rule, level, length),
                "hops": hops(draw, count, length, places=5),
            },
            graph,
            torch.randint(len(graph.values), (count, length), generator=draw),
        )

    return {"train": made(rows), "valid": made(held_out)}
