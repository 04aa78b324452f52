"""What an optimizer takes from the host in each step, in static device memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nexus_core.optimizers import needs_closure, trained
from nexus_plugins._shared.fused import FLAGS

__all__ = ["OnDevice", "obstacle"]


class OnDevice:
    """The learning rates of an optimizer, and a gradient scaler's flags, on the device.

    Args:
        optimizer: the optimizer.
        device: of the run.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._rates: dict[int, Tensor] = {}
        self._flags: dict[str, Tensor] = {}
        self._last: dict[int, float] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the optimizer use them in a block, and capturable code."""
        own, swaps = vars(self._optimizer), []
        flags = {name: own[name] for name in FLAGS if isinstance(own.get(name), Tensor)}
        for number, group in enumerate(self._optimizer.param_groups):
            used = self._used(number, group)
            swaps.append((group, used, {name: group[name] for name in used}))
        own |= {name: self._flag(name, flag) for name, flag in flags.items()}
        try:
            for group, used, _ in swaps:
                group.update(used)
            yield
        finally:
            own |= flags
            for group, used, before in swaps:
                group.update({n: value for n, value in before.items() if group[n] is used[n]})

    def move_state(self) -> None:
        """Move the counters of steps to the device, where they are not with other settings."""
        for parameter in trained(self._optimizer):
            state = self._optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.is_cpu:
                    state[name] = value.to(self._device)

    def _used(self, number: int, group: dict[str, Any]) -> dict[str, Any]:
        rate = {"lr": self._rate(number, group["lr"])}
        return {**rate, "capturable": True} if "capturable" in group else rate

    def _rate(self, number: int, given: Tensor | float) -> Tensor:
        if isinstance(given, Tensor) and not given.is_cpu:
            return given
        if number not in self._rates:
            self._rates[number] = torch.zeros((), device=self._device)
        if self._last.get(number) != (value := float(given)):
            self._last[number] = value
            self._rates[number].fill_(value)
        return self._rates[number]

    def _flag(self, name: str, given: Tensor) -> Tensor:
        if name not in self._flags:
            self._flags[name] = torch.zeros_like(given)
        return self._flags[name].copy_(given)


def obstacle(optimizer: Optimizer, device: torch.device) -> str:
    """Why an optimizer cannot take its steps on the device alone, in words; empty if it can."""
    kind, own = type(optimizer), vars(optimizer).get("step")
    settings = ("capturable" in group or group.get("fused") for group in optimizer.param_groups)
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return f"the method step of {kind.__name__} has been replaced"
    if needs_closure(optimizer):
        return f"{kind.__name__} computes gradients within an update"
    if not (getattr(kind, "capturable", False) or all(settings)):
        return f"{kind.__name__} takes its learning rate from the host"
    if any(parameter.device.type != device.type for parameter in trained(optimizer)):
        return f"{kind.__name__} trains weights that are not on {device}"
    return ""
