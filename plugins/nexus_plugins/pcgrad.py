"""Removes conflicting components between the gradients of loss terms."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nexus_core import Plugin, PluginConfig, hookimpl
from nexus_plugins._shared.term_gradients import (
    Gradient,
    add_term_gradients,
    stack_parts,
    sum_products,
)

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["PcgradConfig", "PcgradPlugin"]


class PcgradConfig(PluginConfig):
    """PCGrad has no settings."""


class PcgradPlugin(Plugin[PcgradConfig]):
    """Projects conflicting gradients of the loss terms away from one another.

    If the gradients of two terms conflict (negative inner product over the parameters that
    several terms depend on), each loses its component along the other. A parameter that only one
    term depends on keeps its gradient. It acts on the gradient of the whole step, however it is
    split into micro-batches, and costs a backward pass and a copy of the gradient per term.

    Source: Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1. All
    projections are linear combinations of the gradients, so they are computed on the matrix of
    inner products. The random order of the projections is a function of seed and step.
    """

    config_class = PcgradConfig
    api_version: ClassVar[str] = "1.2"
    conflicts: ClassVar[tuple[str, ...]] = ("ddp", "fsdp")  # its gradient is that of one process

    def __post_init__(self) -> None:
        self._gradients: dict[str, Gradient] = {}

    @hookimpl
    def backward(self, engine: Engine, terms: Mapping[str, Tensor], step: Step) -> bool:
        """Compute each term's gradient separately; with the last micro-batch, combine them."""
        parameters = [p for p in engine.parameters(step.turn) if p.requires_grad]
        if step.place == 0:
            self._gradients = {}
        self._gradients = add_term_gradients(self._gradients, terms, parameters)
        if step.is_last and self._gradients:
            names, self._gradients, gradients = sorted(self._gradients), {}, self._gradients
            order = random.Random(f"{engine.seed} {engine.state.step}")
            combined = _combined([gradients[name] for name in names], order)
            for parameter, gradient in zip(parameters, combined, strict=True):
                if gradient is not None:
                    old = parameter.grad
                    parameter.grad = gradient if old is None else old + gradient
        return True


def _combined(gradients: Sequence[Gradient], order: random.Random) -> Gradient:
    """The sum of the projected gradients, parameter by parameter."""
    columns = [
        [part for part in parts if part is not None] for parts in zip(*gradients, strict=True)
    ]
    shared = [
        stack_parts(parts)
        for parts, found in zip(zip(*gradients, strict=True), columns, strict=True)
        if len(found) > 1
    ]
    if not shared:
        return [found[0] if found else None for found in columns]
    shares = _projected(sum_products(shared), order)
    mixed = iter(torch.einsum("t,t...->...", shares.to(s.dtype), s) for s in shared)
    return [next(mixed) if len(found) > 1 else (found or [None])[0] for found in columns]


def _projected(products: Tensor, order: random.Random) -> Tensor:
    """The coefficient of each gradient in the sum of the projected ones.

    Args:
        products: inner products `(terms, terms)` of the gradients.
        order: generator of the order in which each is projected against the others.
    """
    terms = len(products)
    shares = torch.eye(terms, device=products.device)
    tiny = torch.finfo(products.dtype).tiny
    for one in range(terms):
        others = [other for other in range(terms) if other != one]
        order.shuffle(others)
        for other in others:
            conflict = (shares[one] @ products[:, other]).clamp(max=0)
            shares[one, other] -= conflict / products[other, other].clamp(min=tiny)
    return shares.sum(0)
