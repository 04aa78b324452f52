"""Limits the length of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nexus_core import Plugin, PluginConfig, hookimpl
from nexus_core.processes import whole

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["ClipConfig", "ClipPlugin"]

FOREACH_ON = ("cpu", "cuda")
EPS = 1e-6  # as in torch: a gradient of zero stays zero


class ClipConfig(PluginConfig):
    """Settings of gradient clipping."""

    max_norm: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,
        description="longest gradient (L2 norm over all parameters); inf: only log it",
    )


class ClipPlugin(Plugin[ClipConfig]):
    """Scales the whole gradient down to `max_norm` where it is longer, and logs its length.

    `train/grad_norm` is the length before clipping. A length that is not finite is left to show
    in the log; refusing such steps is the work of `guard`.

    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks",
    algorithm 1; over what the optimizer trains, to the numbers of `torch.nn.utils.clip_grad_norm_`.
    """

    api_version: ClassVar[str] = "1.2"
    _seen: Sequence[Parameter] = ()
    """The parameters that the last step had gradients for."""
    _plain: bool = False

    @hookimpl(stage="limit")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Clip, and log the norm without waiting for the device; that of a refused step is not."""
        parameters = [p for p in engine.parameters(step.turn) if p.grad is not None]
        if len(parameters) != len(self._seen) or not all(map(is_, parameters, self._seen)):
            self._seen, self._plain = parameters, _are_plain(parameters)
        norm = (_clip_plain if self._plain else _clip_any)(parameters, self.config.max_norm)
        if step.refused is None:
            engine.log("grad_norm", norm)
        else:
            counted = 1.0 - step.refused
            engine.log("grad_norm", torch.where(counted > 0, norm, 0.0), counted)


def _are_plain(parameters: Sequence[Parameter]) -> bool:
    """Whether all gradients are plain tensors of one device and type."""
    kinds = {(p.device.type, p.device.index, p.dtype, type(p)) for p in parameters}
    return (
        len(kinds) == 1
        and all(
            device in FOREACH_ON and kind in (Tensor, Parameter) for device, _, _, kind in kinds
        )
        and not any(p.grad.is_sparse for p in parameters if p.grad is not None)
    )


@torch.no_grad()
def _clip_plain(parameters: Sequence[Parameter], max_norm: float) -> Tensor:
    """`clip_grad_norm_` for plain tensors of one device and type, in half its time.

    It leaves out the sorting of tensors by device and type, which costs a small model more than
    the arithmetic: 30 of 60 microseconds with six parameters.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if norm.is_cpu and norm.item() + EPS <= max_norm:
        return norm  # on the host, looking is free: nothing to scale
    torch._foreach_mul_(gradients, (norm + EPS).reciprocal_().mul_(max_norm).clamp_(max=1.0))
    return norm


@torch.no_grad()
def _clip_any(parameters: Sequence[Parameter], max_norm: float) -> Tensor:
    """`clip_grad_norm_` for any mixture; PyTorch's own takes no `DTensor` beside other tensors."""
    kinds: dict[type, list[Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(type(parameter.grad), []).append(parameter)
    norms = [
        whole(get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in kinds.values()
    ]
    if not norms:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device) for norm in norms])
    )
    for kind in kinds.values():
        clip_grads_with_norm_(kind, max_norm, norm)
    return norm
