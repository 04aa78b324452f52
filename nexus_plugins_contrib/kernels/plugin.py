"""Uses kernels of public packages, each checked before use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus_core import ConfigError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_plugins_contrib.kernels.check import largest_difference
from nexus_plugins_contrib.kernels.swaps import KERNELS, Kernel, Operation

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["KernelsConfig", "KernelsPlugin"]


class KernelsConfig(PluginConfig):
    """Which package's kernel to use for which operation, and how exact it must be."""

    scan: Literal["auto", "mamba_ssm", "fla", "none"] = Field(
        default="auto", description="state-space recurrence: mamba-ssm or flash-linear-attention; "
        "auto: the first one that is installed and passes"
    )  # fmt: skip
    convolve: Literal["auto", "causal_conv1d", "none"] = Field(
        default="auto", description="causal convolution of state-space layers: causal-conv1d"
    )
    linear_cross_entropy: Literal["auto", "liger_kernel", "fla", "none"] = Field(
        default="auto",
        description="language-model loss fused with the output layer: Liger Kernel or "
        "flash-linear-attention"
    )  # fmt: skip
    tolerance: float = Field(
        default=0.02,
        gt=0,
        description="largest allowed difference from float32, relative to the norm of the "
        "expected result, for the output and every gradient",
    )


class KernelsPlugin(Plugin[KernelsConfig]):
    """Runs operations with kernels of public packages if they are installed.

    On the first batch each kernel is compared with the operation that it replaces, computed in
    float32: result and gradients. A kernel that fails is not used, and the difference is reported;
    if it was requested by name, the run ends with an error. `kernels/used` is logged.
    """

    config_class = KernelsConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._swaps: dict[str, _Swap] = {}
        self._swapped: list[tuple[Any, str]] = []
        self._left: dict[str, str] | None = None

    @hookimpl(stage="wrap")
    def on_start(self, engine: Engine) -> None:
        """Replace operations with kernels; each is checked on its first call.

        Raises:
            ConfigError: a requested package is not installed.
        """
        for name, kernels in KERNELS.items():
            parts = [part for part in _parts(engine) if hasattr(part, name)]
            chosen = self._chosen(name, kernels)
            if not (parts and chosen):
                continue
            swap = self._swaps[name] = _Swap(name, chosen, self.config, self._asked(name))
            for part in parts:
                setattr(part, name, _apart(swap.of(part)))
                self._swapped.append((part, name))

    @hookimpl
    def on_step_end(self) -> None:
        """After a resumed run's first step, report operations that used another kernel before."""
        left, self._left = self._left, None
        if left is None:
            return
        for name in sorted({*left, *self.used}):
            before, now = left.get(name, "PyTorch"), self.used.get(name, "PyTorch")
            if before != now:
                warnings.warn(
                    f"resuming: {name} now runs on {now} instead of {before}; the last bits differ",
                    RuntimeWarning,
                    stacklevel=2,
                )

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The number of operations that use a kernel."""
        return {"kernels/used": float(len(self.used))}

    @hookimpl
    def summarize(self) -> dict[str, str]:
        """Say which package ran which operation."""
        said = ", ".join(f"{name} by {package}" for name, package in self.used.items())
        return {"kernels": said or "none: no package for this model is installed"}

    @hookimpl
    def on_close(self) -> None:
        """Restore the operations."""
        for part, name in self._swapped:
            delattr(part, name)
        self._swapped = []

    @property
    def used(self) -> dict[str, str]:
        """The package that runs each operation, of those that have been called."""
        return {name: swap.used for name, swap in self._swaps.items() if swap.used}

    def state_dict(self) -> StateDict:
        """The packages whose kernels were used."""
        return {"used": cast(Any, self.used or self._left or {})}

    def load_state_dict(self, state: StateDict) -> None:
        """Keep it for comparison."""
        self._left = dict(cast(dict[str, str], state["used"]))

    def _asked(self, name: str) -> str:
        return cast(str, getattr(self.config, name))

    def _chosen(self, name: str, kernels: tuple[Kernel, ...]) -> list[Kernel]:
        asked = self._asked(name)
        chosen = [k for k in kernels if asked in ("auto", k.package)]
        missing = [k.package for k in chosen if not k.installed]
        if missing and asked != "auto":
            raise ConfigError(
                f"kernels.{name} is '{asked}', but that package is not installed; install it, or "
                f"set kernels.{name}=auto"
            )
        return [kernel for kernel in chosen if kernel.installed]


@dataclass
class _Swap:
    """One operation, and the kernels that may replace it, preferred ones first.

    Args:
        name: the operation's name.
        left: the kernels that have not failed.
        config: the plugin's settings.
        asked: the requested package, or "auto".
    """

    name: str
    left: list[Kernel]
    config: KernelsConfig
    asked: str
    passed: bool = False

    @property
    def used(self) -> str:
        """The package whose kernel passed; None before the first call, or if none did."""
        return self.left[0].package if self.passed and self.left else ""

    def of(self, part: Any) -> Operation:
        """The replacement of an object's operation."""
        own: Operation = getattr(part, self.name)
        kernel: Operation | None = None

        def run(*arguments: Any) -> Tensor:
            nonlocal kernel
            if not self.passed:
                self._check(part, own, arguments)
            if kernel is None:
                kernel = self.left[0].of(part) if self.left else own
            return kernel(*arguments)

        return run

    def _check(self, part: Any, own: Operation, arguments: tuple[Any, ...]) -> None:
        weights = list(part.parameters()) if isinstance(part, nn.Module) else []
        while self.left and (fault := self._fault(part, own, arguments, weights)):
            said = f"kernels: {self.name} by {self.left[0].package} {fault}"
            if self.asked != "auto":
                raise ConfigError(
                    f"{said}; set kernels.{self.name}=auto to skip it, or raise kernels.tolerance"
                )
            warnings.warn(f"{said}; it is not used", RuntimeWarning, stacklevel=2)
            del self.left[0]
        self.passed = True

    def _fault(
        self, part: Any, own: Operation, arguments: tuple[Any, ...], weights: list[nn.Parameter]
    ) -> str:
        """What is wrong with the first kernel, in words."""
        try:
            kernel = self.left[0].of(part)
            distance, where = largest_difference(kernel, own, arguments, weights)
        except Exception as error:  # any error of a package, compiler or driver is reported
            return f"failed with {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        if distance <= self.config.tolerance:
            return ""
        return (
            f"differs from float32 by a relative {distance:.3g} in {where}; the limit is "
            f"{self.config.tolerance:g}"
        )


def _apart(operation: Operation) -> Operation:
    """The original operation, also inside a compiled module."""
    return cast(Operation, torch.compiler.disable(operation))  # type: ignore[no-untyped-call]


def _parts(engine: Engine) -> Iterator[Any]:
    """The objects that may have an operation: the model's modules, and the plugins."""
    yield from engine.model.modules()
    yield from engine.plugins.values()
