"""Muon, and Muon with AdamW as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nexus_plugins._shared.fused import FLAGS

__all__ = ["Muon", "MuonAndAdamw", "orthogonal"]


class Muon(torch.optim.Muon):
    """PyTorch's Muon, with matmuls in float32 on CPU, where bfloat16 is slow.

    Like PyTorch's fused optimizers, it takes flags on the device: if `found_inf` is 1, a step
    changes nothing, and gradients are divided by `grad_scale`.
    """

    capturable = True  # for compile.step_graph: with a learning rate on the device
    _step_supports_amp_scaling = True  # PyTorch's name for these flags

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        loss = closure() if closure is not None else None
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    gradient = matrix.grad if scale is None else matrix.grad / scale
                    self._update(matrix, gradient, group, found_inf)
        return loss

    def _update(
        self, matrix: Tensor, gradient: Tensor, group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"]
        before = (matrix.clone(), mean.clone()) if found_inf is not None else None
        mean.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean
        _move(matrix, orthogonal(update), group)
        if found_inf is not None and before is not None:
            for value, old in zip((matrix, mean), before, strict=True):
                value.copy_(torch.where(found_inf == 0, value, old))


def _move(matrix: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
    """Decay a matrix, and take a step of the agreed length in a direction."""
    lr, longest = group["lr"], max(matrix.shape)
    matched = group["adjust_lr_fn"] == "match_rms_adamw"
    length = 0.2 * longest**0.5 if matched else max(1, len(matrix) / matrix.shape[1]) ** 0.5
    matrix.mul_(1 - lr * group["weight_decay"])
    if isinstance(lr, Tensor):
        matrix.sub_(direction * (lr * length))
    else:
        matrix.add_(direction, alpha=-lr * length)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near one, by five Newton-Schulz iterations.

    Source: Jordan et al. 2024, with their coefficients; the singular values end up between 0.7 and
    1.2.
    """
    is_tall = len(matrix) > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x.float() if x.device.type == "cpu" else x.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        square = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, square, x, beta=3.4445)
    return (x.mT if is_tall else x).to(matrix.dtype)


class MuonAndAdamw(Optimizer):
    """Two optimizers behind one interface: shared groups, shared state, one step.

    Args:
        muon: the optimizer of the matrices.
        adamw: the optimizer of the other parameters.
    """

    capturable = True

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self._parts = (muon, adamw)
        self._step_supports_amp_scaling = all(group["fused"] for group in adamw.param_groups)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._link()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter."""
        loss = closure() if closure is not None else None
        flags = {name: vars(self)[name] for name in FLAGS if name in vars(self)}
        for part in self._parts:
            vars(part).update(flags)
            part.step()
            for name in flags:
                delattr(part, name)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state into both."""
        super().load_state_dict(state_dict)
        self._link()

    def _link(self) -> None:
        """Share groups and state with both optimizers."""
        muon, adamw = self._parts
        count = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        muon.state = adamw.state = self.state
