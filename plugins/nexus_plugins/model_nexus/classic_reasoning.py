"""The `classic` reasoner: forward chaining in which rules compete at each step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import GatedWrite, Part, widened

__all__ = ["ClassicReasoner"]

PREMISES = 2
TRUTH_FLOOR = 1e-6  # lower bound of a rule's premises, inside the logarithm
HALT_BIAS = -1.0  # initially, a quarter of the rest halts at each step


class ClassicReasoner(Part):
    """Derive beliefs from a token's state, rule by rule, and write them to the stream.

    A state is the degree of belief, from 0 to 1, in each of P predicates. A rule is two premises
    and a conclusion, each of them a symbol that unifies softly with the predicates. At each step
    the rules compete by how well they fit the token and how true their premises are; the winner's
    conclusion is believed as much as its premises (noisy-or: beliefs never decrease). Halting is
    learned: the result is the mean of the states, weighted by the halting probability.

    Shapes: B batch, T time, D model, P predicates, R rules, K steps.

    Args:
        d_model: width D of the backbone states.
        n_predicates: predicates P.
        n_rules: rules R.
        steps: steps K; the last one takes the remaining halting probability.
        d_symbol: width of the symbols' embeddings.

    Source: soft unification of Neural Theorem Provers (Rocktaschel & Riedel 2017), differentiable
        forward chaining of dILP (Evans & Grefenstette 2018), halting of PonderNet (Banino et al.
        2021). Predicates take no arguments: they describe the token whose state is read.
    """

    def __init__(
        self,
        d_model: int,
        n_predicates: int = 32,
        n_rules: int = 16,
        steps: int = 3,
        d_symbol: int = 32,
    ) -> None:
        super().__init__()
        self.n_rules = n_rules
        self.steps = steps
        self.read = nn.Linear(d_model, n_predicates + n_rules)
        self.predicates = nn.Parameter(torch.randn(n_predicates, d_symbol))
        self.premises = nn.Parameter(torch.randn(PREMISES, n_rules, d_symbol))
        self.conclusions = nn.Parameter(torch.randn(n_rules, d_symbol))
        self.halt = nn.Linear(n_predicates, 1)
        nn.init.constant_(self.halt.bias, HALT_BIAS)
        self.write = GatedWrite(n_predicates, d_model)

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Update states of any leading shape, each independently.

        Args:
            h: `(..., D)` normalized backbone states.
            document: unused: tokens do not interact.

        Returns:
            The update `(..., D)`, and a dict with `reason`, the distribution over rules at each
            step `(..., K, R)`, and `reason_halting`, the weight of each step `(..., K)`. Both sum
            to 1 over their last dimension and are in float32 or wider.
        """
        sizes = [self.halt.in_features, self.n_rules]
        beliefs, affinity = torch.split(widened(self.read(h)), sizes, -1)
        with torch.autocast(h.device.type, enabled=False):
            beliefs, rules, halting = self._chain(beliefs.sigmoid(), affinity)
        return self.write(beliefs.to(h.dtype)), {"reason": rules, "reason_halting": halting}

    def _chain(self, beliefs: Tensor, affinity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        premises, conclusions = self._unify(self.premises), self._unify(self.conclusions)
        running = torch.ones_like(beliefs[..., :1])
        result = torch.zeros_like(beliefs)
        distributions, halting = [], []
        for step in range(self.steps):
            first, second = (beliefs @ premise.T for premise in premises)
            truth = first * second
            rules = (affinity + truth.clamp_min(TRUTH_FLOOR).log()).softmax(-1)
            beliefs = beliefs + (1 - beliefs) * ((rules * truth) @ conclusions)
            last = step == self.steps - 1
            chance = torch.ones_like(running) if last else self._halts(beliefs)
            weight = running * chance
            running = running - weight
            result = result + weight * beliefs
            distributions.append(rules)
            halting.append(weight)
        return result, torch.stack(distributions, -2), torch.cat(halting, -1)

    def _halts(self, beliefs: Tensor) -> Tensor:
        weight, bias = widened(self.halt.weight), widened(self.halt.bias)
        return F.linear(beliefs, weight, bias).sigmoid()

    def _unify(self, symbols: Tensor) -> Tensor:
        """`(..., P)`: how well symbols `(..., d_symbol)` match each predicate; rows sum to 1."""
        scores = widened(symbols) @ widened(self.predicates).T / math.sqrt(self.predicates.shape[1])
        return scores.softmax(-1)
