"""Which devices have fused optimizers, which update all weights in one kernel."""

from __future__ import annotations

from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

__all__ = ["FLAGS", "has_fused"]

FLAGS = ("found_inf", "grad_scale")
"""Attributes that PyTorch's gradient scaler sets, for the time of an update, on an optimizer with
`_step_supports_amp_scaling`, as fused ones have it; `guard` sets the first."""


def has_fused(kind: str) -> bool:
    """Whether a kind of device, such as "cuda", has fused optimizers."""
    return kind in _get_fused_kernels_supported_devices()
