"""The process settings that affect PyTorch's rounding and summation order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

__all__ = ["WORKSPACE", "differences", "numerics"]

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The variable that makes cuBLAS use the same workspace each time."""
Setting = bool | str | None


def numerics(device: torch.device) -> dict[str, Setting]:
    """The current settings by name, and the hardware.

    Args:
        device: the run's device.
    """
    products = torch.backends.cuda.matmul
    return {
        "device": _name(device),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cublas_workspace": os.environ.get(WORKSPACE),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "float32_products": torch.get_float32_matmul_precision(),
        "float16_sums_in_16_bits": products.allow_fp16_reduced_precision_reduction,
        "bfloat16_sums_in_16_bits": products.allow_bf16_reduced_precision_reduction,
        "float16_products_in_16_bits": products.allow_fp16_accumulation,
    }


def differences(saved: Mapping[str, object], now: Mapping[str, Setting]) -> Iterator[str]:
    """The differences, in words; keys that only one side has are ignored."""
    for name, value in now.items():
        if name in saved and saved[name] != value:
            yield f"{name} is {value}, was {saved[name]}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type
