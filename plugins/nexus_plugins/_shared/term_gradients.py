"""The gradient of each loss term, and inner products between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Gradient", "add_term_gradients", "stack_parts", "sum_products", "trunk_products"]

Gradient: TypeAlias = list[Tensor | None]
"""One tensor for each parameter, None if the term does not depend on it."""


def add_term_gradients(
    before: Mapping[str, Gradient], terms: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> dict[str, Gradient]:
    """Add a micro-batch's gradients to those of the micro-batches before it.

    Costs one backward pass per term. The graph is retained, and no `.grad` changes.

    Args:
        before: the gradients of the step so far, by term.
        terms: the argument of the `backward` hook, each 0-d; terms without a graph are skipped.
        parameters: the leaves to differentiate with respect to.
    """
    gradients = dict(before)
    for name, term in terms.items():
        if term.requires_grad:
            parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            gradients[name] = _added(gradients.get(name), parts)
    return gradients


def trunk_products(gradients: Mapping[str, Gradient]) -> tuple[tuple[str, ...], Tensor]:
    """The inner products of the terms' gradients over the shared trunk, on the device.

    The trunk is the set of parameters that the most terms depend on, at least two.

    Returns:
        The sorted names of the n terms that depend on it, and a float32 matrix `(n, n)`; both empty
        if there is no trunk.
    """
    reached = [
        sum(part is not None for part in parts) for parts in zip(*gradients.values(), strict=True)
    ]
    most = max(reached, default=0)
    if most < 2:
        return (), torch.zeros(0, 0)
    trunk = {
        name: [part for part, terms in zip(gradients[name], reached, strict=True) if terms == most]
        for name in sorted(gradients)
    }
    there = {name: parts for name, parts in trunk.items() if any(p is not None for p in parts)}
    columns = zip(*there.values(), strict=True)
    return tuple(there), sum_products([stack_parts(parts) for parts in columns])


def sum_products(stacked: Sequence[Tensor]) -> Tensor:
    """The inner products `(terms, terms)`, float32, summed over tensors `(terms, ...)`."""
    flat = [tensor.reshape(len(tensor), -1).float() for tensor in stacked]
    return torch.stack([rows @ rows.T for rows in flat]).sum(0)


def stack_parts(parts: Sequence[Tensor | None]) -> Tensor:
    """The gradients `(terms, ...)` of one parameter, zero for terms that do not depend on it."""
    shape = next(part for part in parts if part is not None)
    return torch.stack([torch.zeros_like(shape) if part is None else part for part in parts])


def _added(total: Gradient | None, parts: Sequence[Tensor | None]) -> Gradient:
    if total is None:
        return list(parts)
    return [
        b if a is None else a if b is None else a + b for a, b in zip(total, parts, strict=True)
    ]
