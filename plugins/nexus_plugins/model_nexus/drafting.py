"""Sample several tokens at a time: drafted by the world model, verified by the model."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nexus_plugins._shared.sampling import Sampling
from nexus_plugins.model_nexus.generate import Stepper, check_request, evaluating

__all__ = ["Drafter", "generate_drafting"]

READ_AT_ONCE = 16  # prompt tokens; the state after each is kept until the next


class Drafter(Stepper, Protocol):
    """A model that predicts its own states, and reads several tokens in one pass."""

    head: nn.Linear

    def read(self, input_ids: Tensor, states: Any) -> tuple[Tensor, list[Any]]:
        """Final states `(B, k, D)` of tokens `(B, k)`, and what `step` needs after each."""

    def foresee(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """The predicted final state `(B, D)` after a token `(B,)`."""


@torch.no_grad()
def generate_drafting(
    model: Drafter,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    draft: int,
) -> Tensor:
    """Continue a prompt by speculative decoding, with drafts of the world model.

    Args:
        model: the model; it is in evaluation mode meanwhile.
        prompt: `(B, T)` token ids, or `(T,)` for one sequence; T at least 1.
        max_new_tokens: tokens to add.
        sampling: how tokens are chosen.
        generator: source of randomness.
        draft: tokens per draft; all rows of a batch keep as many as the row that accepts fewest.

    Returns:
        Prompt and continuation, `(B, T + max_new_tokens)`, without B if `prompt` has none.

    Raises:
        ValueError: an argument is out of its range, or the model has no world model.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
        algorithm 1.
    """
    check_request(prompt, max_new_tokens)
    if draft < 1:
        raise ValueError(f"draft is {draft}; expected 1 or more, or 0 to generate without drafts")
    tokens = prompt.reshape(-1, prompt.shape[-1])
    length = tokens.shape[1] + max_new_tokens
    with evaluating(model):
        states = model.initial_state(len(tokens))
        for piece in torch.split(tokens, READ_AT_ONCE, 1):
            hidden, after = model.read(piece, states)
            states = after[-1]
        last = hidden[:, -1]
        tokens = torch.cat([tokens, _drawn(_chances(model, last, sampling), generator)], 1)
        while tokens.shape[1] < length:
            drafted, guesses = _drafted(model, last, tokens[:, -1], sampling, generator, draft)
            hidden, after = model.read(torch.cat([tokens[:, -1:], drafted], 1), states)
            truth = _chances(model, hidden, sampling)
            new = _kept(drafted, guesses, truth, generator)
            tokens = torch.cat([tokens, new], 1)
            last, states = hidden[:, new.shape[1] - 1], after[new.shape[1] - 1]
    return tokens[:, :length].reshape(*prompt.shape[:-1], -1)


def _drafted(
    model: Drafter,
    hidden: Tensor,
    token: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    draft: int,
) -> tuple[Tensor, Tensor]:
    """Tokens `(B, k)` that the world model expects, and their probabilities `(B, k, V)`."""
    drafted, guesses = [], []
    for _ in range(draft):
        hidden = model.foresee(hidden, token)
        guess = _chances(model, hidden, sampling)
        token = _drawn(guess, generator).squeeze(1)
        drafted.append(token)
        guesses.append(guess)
    return torch.stack(drafted, 1), torch.stack(guesses, 1)


def _kept(
    drafted: Tensor, guesses: Tensor, truth: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The accepted drafts and one more token: `(B, 1)` to `(B, k + 1)`.

    A drafted token is accepted with probability `truth / guess`; the first rejected one is redrawn
    from the excess of `truth` over `guess`. If all are accepted, one more is drawn.
    """
    where = drafted.unsqueeze(-1)
    ratio = (truth[:, :-1].gather(-1, where) / guesses.gather(-1, where)).squeeze(-1)
    luck = torch.rand(ratio.shape, generator=generator, device=ratio.device)
    is_kept = luck < ratio
    count = int(is_kept.long().cumprod(1).sum(1).min())
    if count == drafted.shape[1]:
        return torch.cat([drafted, _drawn(truth[:, -1], generator)], 1)
    missing = (truth[:, count] - guesses[:, count]).clamp(min=0)
    # A row that accepts its token may have no excess; what is drawn for it is not used.
    missing = torch.where(is_kept[:, count, None], truth[:, count], missing)
    instead = _drawn(missing, generator).squeeze(1)
    following = torch.where(is_kept[:, count], drafted[:, count], instead)
    return torch.cat([drafted[:, :count], following.unsqueeze(1)], 1)


def _chances(model: Drafter, hidden: Tensor, sampling: Sampling) -> Tensor:
    return sampling.chances(model.head(hidden).float())


def _drawn(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Tokens `(B, 1)`, drawn with weights `(B, V)`."""
    return torch.multinomial(weights, 1, generator=generator)
