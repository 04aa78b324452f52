"""Features of the last few tokens: hashed n-grams, and what followed them before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NGramState", "NGrams"]

RECALL_BUCKETS = 2**16  # small enough to keep per sequence, with few collisions
MULTIPLIER, MIXER = 0x9E3779B1, 0x85EBCA6B  # odd; products wrap around in 64 bits


class NGramState(NamedTuple):
    """The context that the next token's n-grams need: constant in size."""

    recent: Tensor
    """(B, N - 1): the last tokens plus 1; 0 before the first one."""
    buckets: Tensor
    """(B, R): the bucket of the last n-gram of each recalled length."""
    followed: Tensor
    """(B, R, buckets + 1), int32: the token that followed last, plus 1; 0: none."""


class NGrams(nn.Module):
    """Add embeddings of each token's n-grams, and of the token that followed them before.

    For each of `lengths`, the last n tokens are hashed, and a table gives their embedding. For each
    of `recalls`, the last earlier occurrence of the same n tokens is found, and a table gives an
    embedding of the token that followed there. N-grams and recall do not cross document boundaries.
    The tables start at zero.

    Args:
        vocab_size: tokens V.
        width: width D of the embeddings.
        lengths: lengths of the n-grams with embeddings, each at least 2.
        buckets: entries of the table of each length.
        recalls: lengths of the n-grams whose continuation is recalled, each at least 1.

    Source: Pagnoni et al. 2024, "Byte Latent Transformer", section 3.2.1 (hashed n-grams);
        Akyürek et al. 2024, "In-Context Language Learning: Architectures and Algorithms", section
        6 (n-gram heads, here the last match alone, as in Mahoney 2005, PAQ's match model).
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        lengths: Sequence[int],
        buckets: int,
        recalls: Sequence[int],
    ) -> None:
        super().__init__()
        self.lengths, self.recalls, self.buckets = tuple(lengths), tuple(recalls), buckets
        self.reach = max((*lengths, *recalls))
        self.tables = nn.ModuleList(_zeros(buckets, width) for _ in lengths)
        self.recalled = nn.ModuleList(_zeros(vocab_size + 1, width) for _ in recalls)

    def forward(self, tokens: Tensor, document: Tensor | None) -> Tensor:
        """Embed the n-grams of whole sequences.

        Args:
            tokens: `(B, T)`.
            document: `(B, T)` non-decreasing document indices; None: each row is one document.

        Returns:
            `(B, T, D)`.
        """
        window = self._window(tokens + 1, document)
        recalled = [
            _recall(_bucket(window[:n], RECALL_BUCKETS), tokens, document) for n in self.recalls
        ]
        return self._embed(window, recalled)

    def step(self, tokens: Tensor, state: NGramState) -> tuple[Tensor, NGramState]:
        """Embed the n-grams that end with the tokens `(B,)`; `(B, D)` and the new state."""
        counted = (tokens + 1).unsqueeze(1)
        past = torch.cat([state.recent, counted], 1)
        window = list(past.flip(1).unbind(1))
        followed = state.followed
        buckets, recalled = state.buckets, []
        if self.recalls:
            news = counted.expand_as(buckets).unsqueeze(2).to(followed.dtype)
            followed = followed.scatter(2, buckets.unsqueeze(2), news)
            buckets = torch.stack([_bucket(window[:n], RECALL_BUCKETS) for n in self.recalls], 1)
            found = followed.gather(2, buckets.unsqueeze(2)).squeeze(2).long()
            recalled = list(found.unbind(1))
        return self._embed(window, recalled), NGramState(past[:, 1:], buckets, followed)

    def initial_state(self, batch: int) -> NGramState:
        """The state before the first token, for `batch` sequences."""
        count, device = len(self.recalls), next(self.parameters()).device
        buckets = torch.full((batch, count), RECALL_BUCKETS, device=device)
        size = (batch, count, RECALL_BUCKETS + 1)
        return NGramState(
            torch.zeros(batch, self.reach - 1, dtype=torch.long, device=device),
            buckets,
            torch.zeros(size, dtype=torch.int32, device=device),
        )

    def _window(self, counted: Tensor, document: Tensor | None) -> list[Tensor]:
        """For each distance, the token that far back; 0 before the start of the document."""
        window = [counted]
        for lag in range(1, self.reach):
            earlier = F.pad(counted, (lag, 0))[:, : counted.shape[1]]
            if document is not None:
                earlier = earlier * (F.pad(document, (lag, 0))[:, : counted.shape[1]] == document)
            window.append(earlier)
        return window

    def _embed(self, window: list[Tensor], recalled: list[Tensor]) -> Tensor:
        places = [_bucket(window[:n], self.buckets) for n in self.lengths] + recalled
        tables = [*self.tables, *self.recalled]
        found: list[Tensor] = [table(place) for table, place in zip(tables, places, strict=True)]
        return reduce(Tensor.add, found)


def _zeros(entries: int, width: int) -> nn.Embedding:
    return nn.Embedding(entries, width, _weight=torch.zeros(entries, width))


def _bucket(window: Sequence[Tensor], buckets: int) -> Tensor:
    """The index of each n-gram in a table, given its tokens, newest first."""
    value = torch.full_like(window[0], len(window))
    for token in window:
        value = value * MULTIPLIER + token
    value = (value ^ (value >> 29)) * MIXER
    return (value >> 16).remainder(buckets)


def _recall(bucket: Tensor, tokens: Tensor, document: Tensor | None) -> Tensor:
    """The token, plus 1, after the last earlier occurrence of the bucket; 0: none."""
    key = bucket if document is None else bucket + document * RECALL_BUCKETS
    key, order = key.sort(dim=1, stable=True)
    following = F.pad(tokens[:, 1:] + 1, (0, 1)).gather(1, order)
    found = F.pad(following[:, :-1] * (key[:, 1:] == key[:, :-1]), (1, 0))
    return torch.zeros_like(found).scatter(1, order, found)
