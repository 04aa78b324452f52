"""Continue ids with any model of an engine, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus_core.evaluation import evaluating
from nexus_plugins._shared.outputs import rows_of
from nexus_plugins._shared.sampling import Sampling

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["logits_at", "pieces", "tokens"]

_UNFINISHED = "\ufffd"  # what a partial character decodes to


def logits_at(output: Any, places: Tensor) -> Tensor:
    """The logits `(B, V)` at one position of each row, for any form of model output."""
    states, head = rows_of(output)
    last = states[torch.arange(len(places), device=places.device), places]
    return last if head is None else last.to(head.dtype) @ head.T


@torch.no_grad()
def tokens(
    engine: Engine,
    prompt: Sequence[int],
    sampling: Sampling,
    most: int,
    stop: int | None,
    seed: int,
) -> Iterator[int]:
    """Continue a prompt token by token, with the weights used for evaluation.

    A model with `initial_state` and `step` computes one token at a time, in constant memory; any
    other recomputes all positions for each token.

    Args:
        engine: the engine with the model.
        prompt: at least one id.
        sampling: how tokens are chosen.
        most: maximum number of tokens.
        stop: the token that ends a text, which is not returned; None: no such token.
        seed: equal seeds give equal tokens.
    """
    generator = torch.Generator(engine.device).manual_seed(seed)
    with evaluating(engine, nested=False):
        ask = _stepping(engine) or _whole(engine)
        logits = ask(list(prompt))
        for number in range(most):
            token = int(sampling.choose(logits, generator))
            if token == stop:
                return
            yield token
            if number + 1 < most:
                logits = ask([token])


def _stepping(engine: Engine) -> Callable[[list[int]], Tensor] | None:
    model: Any = engine.model
    if not (hasattr(model, "initial_state") and hasattr(model, "step")):
        return None
    states = model.initial_state(1)

    def ask(ids: list[int]) -> Tensor:
        nonlocal states
        for one in ids:
            logits, states = model.step(torch.tensor([one], device=engine.device), states)
        found: Tensor = logits
        return found

    return ask


def _whole(engine: Engine) -> Callable[[list[int]], Tensor]:
    known: list[int] = []

    def ask(ids: list[int]) -> Tensor:
        known.extend(ids)
        rows = torch.tensor([known], device=engine.device)
        output = engine.hook.forward(engine=engine, batch={"input_ids": rows}, step=None)
        return logits_at(output, torch.tensor([len(known) - 1], device=engine.device))

    return ask


def pieces(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], written: Iterator[int]
) -> Iterator[str]:
    """The text of tokens, in pieces of complete characters.

    Args:
        decode: converts ids to text.
        prompt: the ids before them, which affect the spelling of the first.
        written: the tokens.
    """
    ids = list(prompt)
    shown = len(decode(ids))
    for token in written:
        ids.append(token)
        text = decode(ids)
        if not text.endswith(_UNFINISHED):
            yield text[shown:]
            shown = len(text)
    if rest := decode(ids)[shown:]:
        yield rest
