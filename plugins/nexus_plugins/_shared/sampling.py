"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_plugins._shared.running_sum import running_sum

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How to sample the next token.

    Args:
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample only from this many likeliest tokens; None: all.
        top_p: sample only from the likeliest tokens with this total probability; None: all.

    Raises:
        ValueError: an argument is out of its range.

    Source: top_p is nucleus sampling, Holtzman et al. 2020.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; expected a finite number: 0 (most likely "
                "token) or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k is {self.top_k}; expected 1 or more, or nothing for all tokens"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}; expected above 0 and up to 1, or nothing for all tokens"
            )

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """A token `(B,)` for each row of logits `(B, V)`.

        Args:
            logits: logits of the last positions, on the generator's device.
            generator: source of randomness; None: the device's own.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        shares, tokens = self.shares(logits.float())
        choice = torch.multinomial(shares, 1, generator=generator)
        return tokens.gather(-1, choice).squeeze(-1)

    def chances(self, logits: Tensor) -> Tensor:
        """The probabilities `(..., V)` with which tokens are chosen, 0 for excluded ones."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        shares, tokens = self.shares(logits)
        total = shares.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, tokens, shares / total)

    def shares(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(..., V)` of the tokens, in descending order, and the tokens."""
        ordered, tokens = logits.sort(-1, descending=True)
        # Relative to the largest, so that a low temperature cannot overflow; 0 / 0 would be nan.
        least = torch.finfo(logits.dtype).tiny
        ordered = (ordered - ordered[..., :1]) / max(self.temperature, least)
        if self.top_k is not None:
            ordered[..., self.top_k :] = -torch.inf
        shares = ordered.softmax(-1)
        if self.top_p is not None:
            before = running_sum(shares, -1) - shares
            shares = shares.masked_fill(before >= self.top_p, 0)
            shares[..., 0] = shares[..., 0].clamp_min(least)
        return shares, tokens
