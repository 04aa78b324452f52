"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: among this many likeliest tokens only; None: all.
        top_p: among the likeliest tokens that together hold this probability; None: all.

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
                f"temperature is {self.temperature}; expected a finite number: 0 (likeliest "
                "token) or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}; expected above 0 and up to 1, or None for all tokens"
            )

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """A token `(B,)` for each row of logits `(B, V)`.

        Args:
            logits: of the last positions; the generator is of their device.
            generator: source of randomness; None: the device's own.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        shares, tokens = self.shares(logits.float())
        choice = torch.multinomial(shares, 1, generator=generator)
        return tokens.gather(-1, choice).squeeze(-1)

    def shares(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities `(B, V)`, the likeliest first, and the tokens that they are of."""
        ordered, tokens = logits.sort(-1, descending=True)
        # From the likeliest down, so that a low temperature cannot overflow; 0 / 0 is no number.
        least = torch.finfo(logits.dtype).tiny
        ordered = (ordered - ordered[:, :1]) / max(self.temperature, least)
        if self.top_k is not None:
            ordered[:, self.top_k :] = -torch.inf
        shares = ordered.softmax(-1)
        if self.top_p is not None:
            before = shares.cumsum(-1) - shares
            shares = shares.masked_fill(before >= self.top_p, 0)
            shares[:, 0] = shares[:, 0].clamp_min(least)
        return shares, tokens
