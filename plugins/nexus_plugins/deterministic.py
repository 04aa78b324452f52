"""Makes runs deterministic: repeating a run on the same machine is bitwise identical."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from nexus_core import ConfigError, Plugin, PluginConfig, hookimpl
from nexus_plugins._shared.numerics import WORKSPACE
from nexus_plugins._shared.process_setting import ProcessSetting

__all__ = ["DeterministicConfig", "DeterministicPlugin"]

WORKSPACES = (":4096:8", ":16:8")
"""Workspaces for which cuBLAS is deterministic, according to its manual; the first is as fast."""


def _algorithms() -> str | None:
    if not torch.are_deterministic_algorithms_enabled():
        return None
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "refuse"


def _set_algorithms(missing: str | None) -> None:
    torch.use_deterministic_algorithms(missing is not None, warn_only=missing == "warn")


def _set_workspace(value: str | None) -> None:
    if value is None:
        os.environ.pop(WORKSPACE, None)
    else:
        os.environ[WORKSPACE] = value


def _flag(owner: Any, place: str, name: str) -> ProcessSetting[bool]:
    return ProcessSetting(
        f"{place}.{name}", lambda: getattr(owner, name), lambda value: setattr(owner, name, value)
    )


ALGORITHMS = ProcessSetting("deterministic.missing", _algorithms, _set_algorithms)
CUBLAS = ProcessSetting(WORKSPACE, lambda: os.environ.get(WORKSPACE), _set_workspace)
CUDNN = {
    name: _flag(torch.backends.cudnn, "cudnn", name)
    for name in ("deterministic", "benchmark", "allow_tf32")
}
PRODUCTS = tuple(
    _flag(torch.backends.cuda.matmul, "torch.backends.cuda.matmul", name)
    for name in (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    )
)
"""Flags that allow 16-bit products to be accumulated in 16 bits."""


class DeterministicConfig(PluginConfig):
    """How strict to be, and which roundings to allow."""

    missing: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="what to do at an operation without a deterministic implementation on the "
        "device",
    )
    tf32: bool = Field(
        default=False,
        description="CUDA: allow TF32 (10 mantissa bits) in convolutions, and in float32 products "
        "if enabled",
    )
    sums_in_16_bits: bool = Field(
        default=False, description="CUDA: allow reduced-precision accumulation in 16-bit products"
    )


class DeterministicPlugin(Plugin[DeterministicConfig]):
    """Makes PyTorch, cuBLAS and cuDNN use deterministic algorithms and fixed rounding.

    On CUDA, many kernels sum in the order in which threads finish. With this, the same run on
    the same kind of device with the same versions gives the same bits, more slowly. Operations of
    this package without a deterministic implementation on CUDA are replaced; any other is an error
    that names it. The settings apply to the whole process and are restored when the last
    run that uses them ends.

    Source: PyTorch's notes on reproducibility; cuBLAS, "Results reproducibility".
    """

    config_class = DeterministicConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._held = ExitStack()

    @hookimpl(stage="claim", tryfirst=True)
    def on_start(self) -> None:
        """Apply the settings before anything is computed.

        Raises:
            ConfigError: cuBLAS is configured differently, or float32 products use TF32.
        """
        self._check_precision()
        with ExitStack() as held:
            held.callback(CUBLAS.hold(_workspace()))
            held.callback(ALGORITHMS.hold(self.config.missing))
            held.callback(CUDNN["deterministic"].hold(True))
            held.callback(CUDNN["benchmark"].hold(False))
            held.callback(CUDNN["allow_tf32"].hold(self.config.tf32))
            for setting in PRODUCTS:
                held.callback(setting.hold(self.config.sums_in_16_bits))
            self._held = held.pop_all()

    @hookimpl(stage="inspect")
    def on_batch(self) -> None:
        """Reject TF32 if it has been enabled since the start."""
        self._check_precision()

    @hookimpl
    def on_error(self, error: BaseException) -> None:
        """Say what to do about an operation without a deterministic implementation."""
        if "does not have a deterministic implementation" in str(error):
            error.add_note(
                "deterministic: replace the operation, or allow it: deterministic.missing=warn"
            )

    @hookimpl
    def on_close(self) -> None:
        """Restore every setting."""
        self._held.close()

    def _check_precision(self) -> None:
        if not self.config.tf32 and torch.get_float32_matmul_precision() != "highest":
            raise ConfigError(
                "deterministic: float32 products may be rounded to "
                f"'{torch.get_float32_matmul_precision()}' (amp.tf32, or "
                "torch.set_float32_matmul_precision), and deterministic.tf32 is off; set "
                "deterministic.tf32=true, or disable the other setting"
            )


def _workspace() -> str:
    asked = os.environ.get(WORKSPACE, WORKSPACES[0])
    if asked not in WORKSPACES:
        raise ConfigError(
            f"deterministic: {WORKSPACE} is '{asked}', with which cuBLAS is not "
            f"deterministic; unset it, or set it to {' or '.join(WORKSPACES)}"
        )
    return asked
