"""Mixed precision: compute in 16 bits where safe, keep weights and sums in 32."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, promote_types
from torch.amp import GradScaler, is_autocast_available
from torch.optim import Optimizer

from nexus_core import ConfigError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.optimizers import members, needs_closure
from nexus_plugins._shared.process_setting import ProcessSetting

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["AmpConfig", "AmpPlugin"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION = ProcessSetting(
    "torch's precision of float32 products",
    torch.get_float32_matmul_precision,
    torch.set_float32_matmul_precision,
)
Answers = list[Mapping[str, Tensor]]


class AmpConfig(PluginConfig):
    """Settings of mixed precision."""

    dtype: Literal["bf16", "fp16"] = Field(
        default="bf16", description="fp16 has more mantissa bits, and needs loss scaling"
    )
    initial_scale: float = Field(default=65536.0, gt=0, description="fp16: initial loss scale")
    growth_interval: int = Field(
        default=2000, ge=1, description="fp16: steps between doublings of the scale"
    )
    tf32: bool = Field(
        default=False, description="CUDA: use TF32 (10 mantissa bits) for float32 matrix products"
    )


class AmpPlugin(Plugin[AmpConfig]):
    """Runs the model and the losses under autocast; weights, gradients and updates stay float32.

    With fp16 the gradient is scaled up so that small values survive, and unscaled before
    anything uses it. A step whose gradient overflows is skipped and the scale halved:
    `amp/scale` and `amp/skipped_steps` are logged. The scaling is a hook on each loss term, so
    it works however a plugin runs the backward pass.

    Source: Micikevicius et al. 2018, "Mixed Precision Training"; `torch.amp`.
    """

    config_class = AmpConfig
    api_version: ClassVar[str] = "1.2"
    _scaler: GradScaler | None = None
    _skipped: Tensor
    _unscaled: list[Optimizer]
    """The optimizers whose gradients have been unscaled in this step."""
    _saved: StateDict | None = None

    def __post_init__(self) -> None:
        self._held = ExitStack()

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Reject what the device does not support (ConfigError) and set up the scaler."""
        trained = engine.parameters()
        _check_device(engine.device, {p.device.type for p in trained}, self.config)
        if narrow := {p.dtype for p in trained} & {torch.float16, torch.bfloat16}:
            raise ConfigError(
                f"amp: the weights are {narrow.pop()}, expected float32; remove model.half() "
                "or model.bfloat16(), or do not use amp"
            )
        if self.config.tf32:
            self._held.callback(PRECISION.hold("high"))
        if self.config.dtype == "fp16" and any(
            map(needs_closure, members(engine.optimizer).values())
        ):
            raise ConfigError(
                "amp: fp16 loss scaling does not work with optimizers that need a closure; set "
                "amp.dtype to bf16"
            )
        if self._scaler is not None:  # forget what an interrupted step left in it
            self._saved, self._scaler = self.state_dict(), None
        if self.config.dtype == "fp16":
            scale, interval = self.config.initial_scale, self.config.growth_interval
            self._scaler = GradScaler(engine.device.type, scale, growth_interval=interval)
            self._skipped = torch.zeros((), device=engine.device)
            if self._saved is not None:
                self.load_state_dict(self._saved)

    @hookimpl
    def on_close(self) -> None:
        """Restore the precision of float32 matmuls."""
        self._held.close()

    @hookimpl(wrapper=True, stage="context")
    def forward(self, engine: Engine) -> Generator[None, Any, Any]:
        """Run the model under autocast, in training and in evaluation."""
        with torch.autocast(engine.device.type, DTYPES[self.config.dtype]):
            return (yield)

    @hookimpl(wrapper=True, stage="context")
    def loss_terms(self, engine: Engine) -> Generator[None, Answers, Answers]:
        """Compute the losses under autocast and return them in float32 or wider."""
        with torch.autocast(engine.device.type, DTYPES[self.config.dtype]):
            answers = yield
        single = torch.float32
        return [{n: t.to(promote_types(t.dtype, single)) for n, t in a.items()} for a in answers]

    @hookimpl(wrapper=True, stage="scale")
    def backward(self, terms: Mapping[str, Tensor]) -> Generator[None, bool, bool]:
        """Scale the gradient where it enters each loss term."""
        if self._scaler is not None:
            for term in terms.values():
                if term.requires_grad:
                    term.register_hook(self._scaler.scale)  # type: ignore[no-untyped-call]
        return (yield)

    @hookimpl(stage="unscale")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Unscale the gradient before anything reads it.

        Raises:
            ConfigError: the optimizer recomputes the gradient within a step.
        """
        if self._scaler is None:
            return
        if step.again:
            raise ConfigError(
                "amp: with fp16 the gradient cannot be recomputed within a step, as the "
                "optimizer or a plugin does here; set amp.dtype to bf16"
            )
        self._unscaled = _reached(engine, step)
        for optimizer in self._unscaled:
            self._scaler.unscale_(optimizer)

    @hookimpl
    def optimizer_step(self, engine: Engine, step: Step) -> bool | None:
        """Step unless the gradient overflowed, then update scale and count; no device sync."""
        if self._scaler is None or not self._unscaled:
            return None
        before = self._scaler.scale(one := torch.ones((), device=engine.device))
        for optimizer in self._unscaled:
            self._scaler.step(optimizer)
        step.applied = True
        self._scaler.update()
        skipped = (self._scaler.scale(one) < before).float()
        self._skipped += skipped
        step.refused = skipped if step.refused is None else torch.maximum(step.refused, skipped)
        return True

    @hookimpl
    def collect_metrics(self) -> dict[str, float]:
        """The scale, and how many steps have been skipped so far."""
        if self._scaler is None:
            return {}
        return {"amp/scale": self._scaler.get_scale(), "amp/skipped_steps": self._skipped.item()}

    def state_dict(self) -> StateDict:
        """The scale, its growth tracker, and the count of skipped steps."""
        if self._scaler is None:
            return self._saved or {}
        return {"scaler": self._scaler.state_dict(), "skipped": self._skipped.item()}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the scaler; before the run starts, hold the state until the device is known."""
        self._saved = state
        if self._scaler is not None:
            self._scaler.load_state_dict(cast(dict[str, Any], state["scaler"]))
            self._skipped.fill_(cast(float, state["skipped"]))


def _reached(engine: Engine, step: Step) -> list[Optimizer]:
    """The turn's optimizers that have a gradient."""
    return [
        optimizer
        for optimizer in members(engine.optimizer, step.turn).values()
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    ]


def _check_device(device: torch.device, kept_on: set[str], config: AmpConfig) -> None:
    kind, on_cuda, fault = device.type, device.type == "cuda", ""
    if not is_autocast_available(kind):
        fault = f"no autocast on {kind}; run on cpu or cuda, or do not use amp"
    elif config.dtype == "fp16" and kind in ("mps", "xla"):
        fault = f"no fp16 loss scaling on {kind}; set amp.dtype=bf16"
    elif config.dtype == "fp16" and kept_on != {kind}:
        fault = f"no fp16 loss scaling for weights outside {device}; set amp.dtype=bf16"
    elif config.dtype == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(False):
        fault = f"{torch.cuda.get_device_name(device)} has no bfloat16; set amp.dtype=fp16"
    elif config.tf32 and not (on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        fault = f"TF32 needs a CUDA device of capability 8.0, not {device}; remove amp.tf32"
    if fault:
        raise ConfigError(f"amp: {fault}")
