"""AdamW: the optimizer of most language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch.optim import AdamW, Optimizer

from nexus_core import Plugin, hookimpl
from nexus_core.signatures import Lax
from nexus_plugins._shared.fused import has_fused
from nexus_plugins._shared.parameters import OptimizerConfig, groups_of

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["OptimAdamwConfig", "OptimAdamwPlugin"]


class OptimAdamwConfig(OptimizerConfig):
    """Settings of AdamW."""

    betas: Lax[tuple[float, float]] = Field(
        default=(0.9, 0.95),
        description="decay rates of the running means of the gradient and its square",
    )
    eps: float = Field(
        default=1e-8, gt=0, description="term added to the denominator for numerical stability"
    )
    fused: bool | None = Field(
        default=None, description="use the fused kernel; null: if the device supports it"
    )


class OptimAdamwPlugin(Plugin[OptimAdamwConfig]):
    """Trains with AdamW; weight decay applies to matrices only.

    Biases, norms, embeddings (and a head tied to one), vectors, and parameters with the attribute
    `_no_weight_decay = True` are not decayed.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; the update is
    `torch.optim.AdamW`, fused on CPU and CUDA.
    """

    config_class = OptimAdamwConfig
    slot: ClassVar[str | None] = "optimizer"

    @hookimpl
    def make_optimizer(self, engine: Engine) -> Optimizer:
        """Build AdamW over the model's parameters, grouped by pattern and weight decay.

        Raises:
            ConfigError: a pattern matches no parameter, or all are frozen.
        """
        groups = groups_of(engine.model, self.config, self.name)
        fused = self.config.fused
        if fused is None:
            fused = all(
                has_fused(parameter.device.type) and parameter.is_floating_point()
                for group in groups
                for parameter in group["params"]
            )
        return AdamW(
            groups,
            lr=self.config.lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            fused=fused,
        )
