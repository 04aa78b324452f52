"""The reasoner: recall what earlier tokens know, apply all rules, and again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import GATE_START, Part, widened
from nexus_plugins.model_nexus.window import WindowAttention, WindowState

__all__ = ["Reasoner"]

EAGERNESS = 16.0
"""How much faster this gate opens than others from the same start; the loop trains through it."""


class Reasoner(Part):
    """Derive facts from what the last tokens know, by rules that fire in parallel.

    The facts about a token are its state in the stream. At each step the token first recalls, by
    attention, what the last tokens know by now. Then every rule reads the facts, which gives an x:
    it fires as strongly as `sigmoid(x)`, and adds `silu(x)` times its conclusions to the facts. So
    a step applies all rules that hold, as in forward chaining, and conclusions about one token are
    premises for later tokens at the next step.

    No parameter is specific to a step, so longer derivations are composed of single steps, and a
    model trained with K steps can run one more to derive what is one step further away
    (`model_nexus.reasoning_steps`, or `steps` of this module).

    Shapes: B batch, T time, D model, R rules, K steps, W window, H heads of P.

    Args:
        d_model: width D of the stream.
        n_rules: rules R.
        steps: steps K.
        window: tokens W that a token recalls from, including itself.
        head_dim: maximum width P of a head.

    Source: a block shared over depth, as in Universal Transformers (Dehghani et al. 2019) and in
        recurrent depth (Geiping et al. 2025); each of its hidden units is a rule.
    """

    def __init__(
        self, d_model: int, n_rules: int = 128, steps: int = 3, window: int = 64, head_dim: int = 64
    ) -> None:
        super().__init__()
        self.steps = steps
        self.recall = WindowAttention(d_model, head_dim, window)
        self.premises = nn.Linear(d_model, n_rules)
        self.conclusions = nn.Linear(n_rules, d_model, bias=False)
        self.gate = nn.Parameter(torch.full((d_model,), GATE_START / EAGERNESS))

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Update whole sequences.

        Args:
            h: `(B, T, D)` normalized backbone states.
            document: `(B, T)` non-decreasing document indices; None: each row is one document.

        Returns:
            The update `(B, T, D)`, and `{"reason": firing}` with `(B, T, R)` in float32 or wider:
            how strongly each rule fired, from 0 to 1, averaged over the steps.
        """
        update = torch.zeros_like(h)
        fired = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32))
        for _ in range(self.steps):
            update = update + self.recall(_normed(h + update), document)
            concluded, firing = self._conclude(h + update)
            update = update + concluded
            fired = fired + firing
        return self._gated(update), {"reason": fired / self.steps}

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """What is recalled at each step, `WindowState` with K after the batch, before any token."""
        empty = self.recall.initial_state(batch)
        return tuple(torch.stack(self.steps * [part], 1) for part in empty)

    def step(self, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The update `(B, D)` of one token `(B, D)`, equal to `forward`, and the new state.

        Raises:
            ValueError: the state is from before `steps` was changed.
        """
        if (of_state := state[0].shape[1]) != self.steps:
            raise ValueError(
                f"the reasoner makes {self.steps} steps, but its state is for {of_state}; start "
                "with a new initial_state after changing steps"
            )
        update, after = torch.zeros_like(h), []
        for past in zip(*(part.unbind(1) for part in state), strict=True):
            recalled, now = self.recall.step(_normed(h + update), WindowState(*past))
            update = update + recalled
            update = update + self._conclude(h + update)[0]
            after.append(now)
        return self._gated(update), tuple(
            torch.stack(parts, 1) for parts in zip(*after, strict=True)
        )

    def _gated(self, update: Tensor) -> Tensor:
        return update * (EAGERNESS * self.gate)

    def _conclude(self, facts: Tensor) -> tuple[Tensor, Tensor]:
        """What all rules conclude from facts `(..., D)`, and how strongly each fires `(..., R)`."""
        found = self.premises(_normed(facts))
        return self.conclusions(F.silu(found)), widened(found).sigmoid()


def _normed(facts: Tensor) -> Tensor:
    return F.rms_norm(facts, facts.shape[-1:])
