"""A loss function or module by import path: its inputs, its result, its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from nexus_core.batches import Batch, batch_size, leaves
from nexus_core.errors import ConfigError, DataError, hint_set, suggestion
from nexus_plugins._shared.calls import Call, Callee, callee, located, parameters_of, takes

__all__ = ["TARGETS", "Criterion", "Given"]

TARGETS = ("target", "targets", "label", "labels", "y")
ROWS = "rows"
_FACTS = ("reduction", "ignore_index", "weight")


class Given:
    """A function whose last positional argument is the targets of a batch, or the batch.

    Args:
        function: the function, with its arguments.
        target: key or index of the targets in a batch; None: the usual ones.
        before: number of arguments before them.
    """

    def __init__(self, function: Callee, target: str | int | None, before: int = 1) -> None:
        self.function = function
        self._target = target
        self._setting = f"{function.key.partition('.')[0]}.target"
        named = function.function
        self._whole = takes(getattr(named, "forward", named), before, "batch")

    def __call__(self, batch: Batch, *first: object) -> Any:
        """Call the function for a batch."""
        return self.function(*first, batch if self._whole else self.target(batch))

    def target(self, batch: Batch) -> Any:
        """The targets of a batch.

        Raises:
            DataError: the batch has no such targets.
        """
        if self._target is not None:
            try:
                return batch[self._target]
            except (LookupError, TypeError):
                known = list(batch) if isinstance(batch, Mapping) else []
                said = suggestion(str(self._target), map(str, known))
                raise DataError(
                    f"{self._setting} is {self._target!r}, which {_described(batch)} does not have."
                    f"{said}"
                ) from None
        if isinstance(batch, list | tuple) and len(batch) > 1:
            return batch[1]
        found = [key for key in TARGETS if isinstance(batch, Mapping) and key in batch]
        if len(found) == 1:
            return batch[found[0]]
        raise DataError(
            f"which entry of {_described(batch)} is the target of {self.function.place}? Set it, "
            "such as ",
            hint_set(self._setting, "label"),
            ", or name the function's second parameter 'batch' to get all of it",
        )


class Criterion(Given):
    """The loss: a function of `(output, target)`, or a class whose instances are callable.

    Args:
        key: the setting that names it.
        call: the value of the setting.
        target: key or index of the targets in a batch.
        units: counts the units of a batch if the loss is a sum; None: it is a mean.

    Raises:
        ConfigError: it has another signature or reduction, or trainable weights.
    """

    def __init__(self, key: str, call: Call, target: str | int | None, units: Call | None) -> None:
        self.module: nn.Module | None = None
        if isinstance(located(key, call.call), type):
            made = callee(key, call)
            function = Callee(made(), made.place, key)
            self.module = function.function if isinstance(function.function, nn.Module) else None
            self._facts = {name: getattr(function.function, name, None) for name in _FACTS}
        else:
            function = callee(key, call, ("output", "target"))
            defaults = parameters_of(function.function) or {}
            self._facts = {n: defaults[n].default if n in defaults else None for n in _FACTS}
            self._facts |= {n: value for n, value in function.args.items() if n in _FACTS}
        super().__init__(function, target)
        self._count: Given | None = None
        if units is not None and units.call != ROWS:
            self._count = Given(callee(f"{key}.units", units, ("target",)), target, 0)
        self.is_mean = units is None
        self._check()

    def _check(self) -> None:
        key, place = self.function.key, self.function.place
        reduction = self._facts["reduction"]
        if self.module is not None and any(True for _ in self.module.parameters()):
            raise ConfigError(
                f"{key}: {place} has parameters that no optimizer would train; move them into the "
                "model"
            )
        fitting = ("mean", "batchmean") if self.is_mean else ("sum",)
        if isinstance(reduction, str) and reduction not in fitting:
            how = f"{key}.args.reduction={fitting[0]}"
            other = f"; for a sum, set {key}.units to what it sums over" if self.is_mean else ""
            raise ConfigError(
                f"{key}: the reduction of {place} is '{reduction}', and with {key}.units "
                f"{'unset' if self.is_mean else 'set'} it must be '{fitting[0]}': {how}{other}"
            )

    def to(self, device: torch.device) -> None:
        """Move its tensors, such as class weights, to the device."""
        if self.module is not None:
            self.module.to(device)
        given = self.function.args.items()
        args = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in given}
        self.function = replace(self.function, args=args)

    def units(self, batch: Batch) -> Tensor | float:
        """The number of units in a batch: as configured, or else its labels or rows."""
        if self._count is not None:
            found: Tensor | float = self._count(batch)
            return found
        ignored, weight = self._facts["ignore_index"], self._facts["weight"]
        target = self.target(batch) if self.is_mean and ignored is not None else None
        if not isinstance(target, Tensor) or target.is_floating_point():  # one unit per row
            return float(batch_size(batch)[0])
        counted = target != cast(int, ignored)
        if isinstance(weight, Tensor):  # the mean is over weighted labels
            return weight.to(target.device)[target[counted]].sum()
        return counted.sum()

    def sum(self, batch: Batch, output: Any, units: Tensor | float) -> Tensor:
        """The loss, summed over the units of a batch.

        A mean is multiplied in double precision without loss, so that dividing by the same number
        of units gives exactly the mean again.

        Raises:
            ConfigError: the function did not return a scalar.
        """
        if _is_nothing(units):  # the mean over nothing is nan
            return _zero(output)
        loss = self(batch, output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ConfigError(
                f"{self.function.key}: {self.function.place} returned {_shape(loss)}; it must "
                "return a tensor of one number" + ", the mean" * self.is_mean
            )
        loss = loss.reshape(())
        if not self.is_mean:
            return loss
        return (loss if loss.device.type == "mps" else loss.double()) * units


def _is_nothing(units: Tensor | float) -> bool:
    """Whether a batch has no units, as far as known without a device sync."""
    return not (isinstance(units, Tensor) and units.device.type != "cpu") and not units


def _zero(output: Any) -> Tensor:
    """Zero, connected to the output's graph, so that all ranks run the same backward pass."""
    found = [x for x in leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.stack([tensor.sum() * 0.0 for tensor in found]).sum()


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _described(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return f"a batch with the keys {', '.join(map(str, batch))}"
    size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
    return f"a batch that is a {type(batch).__name__}{size}"
