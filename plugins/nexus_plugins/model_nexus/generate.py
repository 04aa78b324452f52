"""Sampling from a model that reads one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.operations import running_sum

__all__ = ["Limits", "Stepper", "chances", "check_request", "evaluating", "generate"]


class Limits(NamedTuple):
    """Which tokens may be sampled: see `generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class Stepper(Protocol):
    """A model that carries its past in a state of constant size."""

    def initial_state(self, batch: int) -> Any:
        """The state before the first token."""

    def step(self, input_ids: Tensor, states: Any) -> tuple[Tensor, Any]:
        """Logits `(B, V)` after the tokens `(B,)`, and the new state."""

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on or off."""

    def modules(self) -> Iterator[nn.Module]:
        """The model and all of its parts."""


@torch.no_grad()
def generate(
    model: Stepper,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a prompt by sampling, one token after the other.

    Args:
        model: what predicts; it is in evaluation mode meanwhile.
        prompt: `(B, T)` token numbers, or `(T,)` for one sequence; T at least 1.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample among this many likeliest tokens only.
        top_p: sample among the likeliest tokens that together hold this probability.
        generator: source of randomness; the same seed gives the same tokens.

    Returns:
        Prompt and continuation, `(B, T + max_new_tokens)`, or without B if `prompt` was.

    Raises:
        ValueError: an argument is out of its range.

    Source: top_p is nucleus sampling, Holtzman et al. 2020.
    """
    limits = Limits(temperature, top_k, top_p)
    check_request(prompt, max_new_tokens, limits)
    tokens = list(prompt.reshape(-1, prompt.shape[-1]).unbind(1))
    with evaluating(model):
        states = model.initial_state(len(tokens[0]))
        for token in tokens:
            logits, states = model.step(token, states)
        for _ in range(max_new_tokens):
            tokens.append(_sample(logits.float(), limits, generator))
            logits, states = model.step(tokens[-1], states)
    return torch.stack(tokens, 1).reshape(*prompt.shape[:-1], -1)


@contextmanager
def evaluating(model: Stepper) -> Iterator[None]:
    """The model in evaluation mode meanwhile, with each part's own mode afterwards."""
    training = [part for part in model.modules() if part.training]
    model.train(False)
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _sample(logits: Tensor, limits: Limits, generator: torch.Generator | None) -> Tensor:
    if limits.temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = _ordered(logits, limits)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, choice).squeeze(-1)


def chances(logits: Tensor, limits: Limits) -> Tensor:
    """The probabilities `(..., V)` with which tokens are sampled, 0 for those that never are."""
    if limits.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    probabilities, tokens = _ordered(logits, limits)
    total = probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, tokens, probabilities / total)


def _ordered(logits: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Weights of the tokens within the limits, from the likeliest down, and the tokens."""
    tiny = torch.finfo(logits.dtype).tiny
    ordered, tokens = logits.sort(-1, descending=True)
    # From the likeliest down, so that a low temperature cannot overflow; 0 / 0 is no number.
    ordered = (ordered - ordered[..., :1]) / max(limits.temperature, tiny)
    if limits.top_k is not None:
        ordered[..., limits.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    if limits.top_p is not None:
        before = running_sum(probabilities, -1) - probabilities
        probabilities = probabilities.masked_fill(before >= limits.top_p, 0)
        probabilities[..., 0] = probabilities[..., 0].clamp_min(tiny)
    return probabilities, tokens


def check_request(prompt: Tensor, max_new_tokens: int, limits: Limits) -> None:
    """Refuse arguments that are out of their range (a ValueError)."""
    temperature, top_k, top_p = limits
    if prompt.dim() not in (1, 2) or prompt.numel() == 0:
        raise ValueError(
            f"prompt has shape {tuple(prompt.shape)}; expected (batch, time) or (time,) with at "
            f"least one token. To start from nothing, give the end-of-document token."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; expected a finite number: 0 (likeliest token) or more"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 or more, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected above 0 and up to 1, or None for all tokens")
