"""Logs gradient norms by module and by loss term, and where terms disagree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nexus_core import Plugin, PluginConfig, hookimpl
from nexus_plugins._shared.term_gradients import Gradient, add_term_gradients, trunk_products

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["GradStatsConfig", "GradStatsPlugin"]

TINY = 1e-30


class GradStatsConfig(PluginConfig):
    """Settings of the gradient statistics."""

    depth: int = Field(
        default=2, ge=1, description="depth of the module path: 2 separates blocks.0 from blocks.1"
    )
    every: int = Field(default=10, ge=1, description="steps between measurements per module")
    terms_every: int | None = Field(
        default=100,
        ge=1,
        description="steps between measurements per term, which cost one backward pass per term; "
        "null: never",
    )


class GradStatsPlugin(Plugin[GradStatsConfig]):
    """Measures gradients before they are clipped; does not affect training.

    `grad_norm/<module>`: L2 norm over the module's parameters. `grad_norm/term/<name>` and
    `grad_cosine/<a>_<b>`: the weighted gradient of each term over the trunk, which are the
    parameters reached by the most terms: its L2 norm, and the cosine between two of them (-1: they
    cancel out). All cover the whole step, however it is split into micro-batches, and only this
    rank if there are several. Nothing syncs with the device.
    """

    config_class = GradStatsConfig
    topology_invariant: ClassVar[bool] = False
    api_version: ClassVar[str] = "1.2"
    _gradients: dict[str, Gradient]

    def __post_init__(self) -> None:
        self._gradients = {}

    @hookimpl(wrapper=True)
    def backward(
        self, engine: Engine, terms: Mapping[str, Tensor], step: Step
    ) -> Generator[None, bool, bool]:
        """If due, take each term's gradient separately before the combined backward pass."""
        period = self.config.terms_every
        if period and (step.number - 1) % period == 0 and len(terms) > 1 and not step.again:
            before = self._gradients if step.place else {}
            parameters = [p for p in engine.model.parameters() if p.requires_grad]
            self._gradients = add_term_gradients(before, terms, parameters)
            if step.is_last:
                gradients, self._gradients = self._gradients, {}
                self._log_terms(engine, gradients, _entry_scale(terms))
        return (yield)

    @hookimpl(stage="inspect")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Log each module's gradient norm at steps 1, 1 + every, ..."""
        if (step.number - 1) % self.config.every or step.again:
            return
        for path, members in by_module(engine.model, self.config.depth).items():
            gradients = [p.grad for p in members if p.grad is not None]
            if gradients:
                engine.log(f"grad_norm/{path}", get_total_norm(gradients))

    def _log_terms(self, engine: Engine, gradients: Mapping[str, Gradient], scale: Tensor) -> None:
        names, products = trunk_products(gradients)
        norms = products.diagonal().sqrt()
        for name, norm in zip(names, norms, strict=True):
            engine.log(f"grad_norm/term/{name}", norm / scale)
        for (i, one), (j, other) in combinations(enumerate(names), 2):
            cosine = products[i, j] / (norms[i] * norms[j]).clamp(min=TINY)
            engine.log(f"grad_cosine/{one}_{other}", cosine)


def by_module(model: nn.Module, depth: int) -> dict[str, list[nn.Parameter]]:
    """The trained parameters, grouped by the first `depth` parts of their module's path.

    Parameters that belong to the model itself are grouped under "model".
    """
    modules: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = name.split(".")[:-1][:depth]
            modules[".".join(path) or "model"].append(parameter)
    return dict(modules)


def _entry_scale(terms: Mapping[str, Tensor]) -> Tensor:
    """The factor by which hooks on the terms, such as fp16 scaling, multiply the gradient."""
    term = next(term for term in terms.values() if term.requires_grad)
    return torch.autograd.grad(term, term, retain_graph=True)[0].float()
