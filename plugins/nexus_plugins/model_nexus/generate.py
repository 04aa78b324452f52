"""Sample from a model that reads one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nexus_plugins._shared.sampling import Sampling

__all__ = ["Stepper", "check_request", "evaluating", "generate"]


class Stepper(Protocol):
    """A model that keeps its context in a state of constant size."""

    def initial_state(self, batch: int) -> Any:
        """The state before the first token."""

    def step(self, input_ids: Tensor, states: Any) -> tuple[Tensor, Any]:
        """Logits `(B, V)` after the tokens `(B,)`, and the new state."""

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on or off."""

    def modules(self) -> Iterator[nn.Module]:
        """The model and all its submodules."""


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
    """Continue a prompt by sampling, one token at a time.

    Args:
        model: the model; it is in evaluation mode meanwhile.
        prompt: `(B, T)` token ids, or `(T,)` for one sequence; T at least 1.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample only from this many likeliest tokens.
        top_p: sample only from the likeliest tokens with this total probability.
        generator: source of randomness; the same seed gives the same tokens.

    Returns:
        Prompt and continuation, `(B, T + max_new_tokens)`, without B if `prompt` has none.

    Raises:
        ValueError: an argument is out of its range.

    Source: top_p is nucleus sampling, Holtzman et al. 2020.
    """
    sampling = Sampling(temperature, top_k, top_p)
    check_request(prompt, max_new_tokens)
    tokens = list(prompt.reshape(-1, prompt.shape[-1]).unbind(1))
    with evaluating(model):
        states = model.initial_state(len(tokens[0]))
        for token in tokens:
            logits, states = model.step(token, states)
        for _ in range(max_new_tokens):
            tokens.append(sampling.choose(logits, generator))
            logits, states = model.step(tokens[-1], states)
    return torch.stack(tokens, 1).reshape(*prompt.shape[:-1], -1)


@contextmanager
def evaluating(model: Stepper) -> Iterator[None]:
    """Put the model in evaluation mode, and restore each module's mode afterwards."""
    training = [part for part in model.modules() if part.training]
    model.train(False)
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_request(prompt: Tensor, max_new_tokens: int) -> None:
    """Reject out-of-range arguments (ValueError)."""
    if prompt.dim() not in (1, 2) or prompt.numel() == 0:
        raise ValueError(
            f"prompt has shape {tuple(prompt.shape)}; expected (batch, time) or (time,) with at "
            f"least one token. To start from nothing, give the end-of-document token."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
