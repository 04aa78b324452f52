"""Which devices have fused optimizers, which update all weights in one kernel."""

from __future__ import annotations

from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

__all__ = ["has_fused"]


def has_fused(kind: str) -> bool:
    """Whether a kind of device, such as "cuda", has fused optimizers."""
    return kind in _get_fused_kernels_supported_devices()
