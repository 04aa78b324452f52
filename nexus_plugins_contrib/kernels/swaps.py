"""Which packages have a kernel for which operation, and how to call it.

An operation is a method of a module or plugin, identified by its name: `scan` and `convolve` of
state-space layers, `linear_cross_entropy` of a loss. A kernel gets the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KERNELS", "Kernel", "Operation", "available"]

Operation: TypeAlias = Callable[..., Tensor]
FORGET = -50.0
"""The log decay at the start of a document; the remainder, 2e-22, is below any rounding."""
CHUNK = 256
"""Positions in a chunk of mamba-ssm's scan, as in its own layers; changes speed and rounding."""


@dataclass(frozen=True)
class Kernel:
    """A package's function for an operation.

    Args:
        package: its import name, which is also used in settings.
        place: module and name of the function.
        adapt: given it and the object whose operation it replaces, returns the function to call.
    """

    package: str
    place: str
    adapt: Callable[[Any, Any], Operation]

    @property
    def installed(self) -> bool:
        """Whether its package is installed."""
        return find_spec(self.package) is not None

    def of(self, part: Any) -> Operation:
        """The function to call instead of the object's own operation.

        Raises:
            ImportError, AttributeError: the package is broken, or another version.
        """
        module, _, name = self.place.partition(":")
        return self.adapt(getattr(import_module(module), name), part)


def _mamba_scan(kernel: Any, layer: Any) -> Operation:
    def scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, document: Tensor | None) -> Tensor:
        result: Tensor = kernel(
            x, dt, -layer.log_rate.exp(), b.unsqueeze(2), c.unsqueeze(2), CHUNK,
            D=layer.skip, seq_idx=_numbers(document),
        )  # fmt: skip
        return result

    return scan


def _gated_linear_attention(kernel: Any, layer: Any) -> Operation:
    """The same recurrence as attention: queries c, keys b, values dt x, forget gates."""

    def scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, document: Tensor | None) -> Tensor:
        keys, queries = (v.unsqueeze(2).expand(-1, -1, x.shape[2], -1) for v in (b, c))
        gates = dt * -layer.log_rate.exp()
        if document is not None:
            begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0))
            gates = gates.masked_fill(begins.unsqueeze(-1), FORGET)
        values = (x * dt.unsqueeze(-1)).to(x.dtype)
        result, _ = kernel(queries, keys, values, g=gates, scale=1.0)
        whole: Tensor = result + x * layer.skip.unsqueeze(-1)
        return whole.to(x.dtype)

    return scan


def _causal_conv1d(kernel: Any, layer: Any) -> Operation:
    def convolve(x: Tensor, document: Tensor | None) -> Tensor:
        taps = layer.conv_weight.flip(0).T.contiguous()  # its last tap is the current token
        result: Tensor = kernel(
            x.transpose(1, 2), taps, layer.conv_bias, seq_idx=_numbers(document), activation="silu"
        )
        return result.transpose(1, 2)

    return convolve


def _liger_loss(kernel: Any, _: Any) -> Operation:
    def loss(
        rows: Tensor, head: Tensor, labels: Tensor, smoothing: float, ignore_index: int
    ) -> Tensor:
        rows, head = _narrowed(rows, head)
        result: Tensor = kernel(
            rows, head, labels, ignore_index=ignore_index, label_smoothing=smoothing,
            reduction="sum", accum_dtype=torch.float32,
        )  # fmt: skip
        return result

    return loss


def _fla_loss(kernel: Any, _: Any) -> Operation:
    def loss(
        rows: Tensor, head: Tensor, labels: Tensor, smoothing: float, ignore_index: int
    ) -> Tensor:
        rows, head = _narrowed(rows, head)
        result: Tensor = kernel(
            rows, labels, head, ignore_index=ignore_index, label_smoothing=smoothing,
            reduction="sum",
        )  # fmt: skip
        return result

    return loss


def _numbers(document: Tensor | None) -> Tensor | None:
    return None if document is None else document.to(torch.int32).contiguous()


def _narrowed(*values: Tensor) -> list[Tensor]:
    """Cast to autocast's dtype, which kernels ignore."""
    device = values[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(values)
    return [value.to(torch.get_autocast_dtype(device)) for value in values]


KERNELS: dict[str, tuple[Kernel, ...]] = {
    "scan": (
        Kernel(
            "mamba_ssm", "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined", _mamba_scan
        ),
        Kernel("fla", "fla.ops.simple_gla:chunk_simple_gla", _gated_linear_attention),
    ),
    "convolve": (Kernel("causal_conv1d", "causal_conv1d:causal_conv1d_fn", _causal_conv1d),),
    "linear_cross_entropy": (
        Kernel(
            "liger_kernel",
            "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
            _liger_loss,
        ),
        Kernel(
            "fla",
            "fla.modules.fused_linear_cross_entropy:fused_linear_cross_entropy_loss",
            _fla_loss,
        ),
    ),
}
"""The kernels of each operation, preferred ones first."""


def available() -> list[str]:
    """The installed kernel packages."""
    found = {kernel.package for kernels in KERNELS.values() for kernel in kernels
             if kernel.installed}  # fmt: skip
    return sorted(found)
