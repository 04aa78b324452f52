"""The reasoner: rules that all fire at once, step after step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.residual import GatedWrite, Part, widened

__all__ = ["Reasoner"]

CONCLUSION_SCALE = 0.5


class Reasoner(Part):
    """Derive facts from a token's state, by rules that fire in parallel.

    The facts are P numbers. At each step every rule reads all facts, through its own weights, and
    the token; this determines how strongly it fires, and each firing rule adds its conclusions to
    the facts: a step applies all rules that hold, as in forward chaining. The rules are the same at
    each step, so longer derivations are composed of single steps. No parameter is specific to a
    step: a model trained with K steps can run one more to derive what is one step further away
    (`model_nexus.reasoning_steps`, or `steps` of this module).

    Shapes: B batch, T time, D model, P facts, R rules, K steps.

    Args:
        d_model: width D of the backbone states.
        n_predicates: facts P.
        n_rules: rules R.
        steps: steps K.

    Source: a block in a loop, as in Universal Transformers (Dehghani et al. 2019) and in recurrent
        depth (Geiping et al. 2025), with the token re-read at each step, as there.
    """

    def __init__(
        self, d_model: int, n_predicates: int = 64, n_rules: int = 128, steps: int = 3
    ) -> None:
        super().__init__()
        self.n_predicates, self.n_rules, self.steps = n_predicates, n_rules, steps
        self.read = nn.Linear(d_model, n_predicates + n_rules)
        self.premises = nn.Linear(n_predicates, n_rules, bias=False)
        self.conclusions = nn.Linear(n_rules, n_predicates, bias=False)
        self.write = GatedWrite(n_predicates, d_model)
        nn.init.normal_(self.conclusions.weight, std=CONCLUSION_SCALE * n_rules**-0.5)

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Update states of any leading shape, each independently.

        Args:
            h: `(..., D)` normalized backbone states.
            document: unused: tokens do not interact.

        Returns:
            The update `(..., D)`, and `{"reason": firing}` with `(..., R)` in float32 or wider: how
            strongly each rule fired, from 0 to 1, averaged over the steps.
        """
        sizes = [self.n_predicates, self.n_rules]
        with torch.autocast(h.device.type, enabled=False):
            facts, seen = torch.split(_linear(self.read, widened(h)), sizes, -1)
            fired = torch.zeros_like(seen)
            for _ in range(self.steps):
                found = _linear(self.premises, _normed(facts)) + seen
                facts = facts + _linear(self.conclusions, F.silu(found))
                fired = fired + found.sigmoid()
            derived = _normed(facts)
        return self.write(derived.to(h.dtype)), {"reason": fired / self.steps}


def _linear(layer: nn.Linear, value: Tensor) -> Tensor:
    """Apply the layer in the value's dtype, which is float32 or wider."""
    bias = None if layer.bias is None else layer.bias.to(value.dtype)
    return F.linear(value, layer.weight.to(value.dtype), bias)


def _normed(facts: Tensor) -> Tensor:
    return F.rms_norm(facts, facts.shape[-1:])
