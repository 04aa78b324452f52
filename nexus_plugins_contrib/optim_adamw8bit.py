"""AdamW with a quarter of the state memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field
from torch.optim import Optimizer

from nexus_core import ConfigError, Plugin, hookimpl
from nexus_core.signatures import Lax
from nexus_plugins._shared.parameters import OptimizerConfig, groups_of

if TYPE_CHECKING:
    from nexus_core import Engine

__all__ = ["OptimAdamw8BitConfig", "OptimAdamw8BitPlugin"]


class OptimAdamw8BitConfig(OptimizerConfig):
    """Settings of 8-bit AdamW."""

    betas: Lax[tuple[float, float]] = Field(
        default=(0.9, 0.95),
        description="decay rates of the running means of the gradient and its square",
    )
    eps: float = Field(
        default=1e-8, gt=0, description="term added to the denominator for numerical stability"
    )
    min_8bit_size: int = Field(
        default=4096, ge=1, description="parameters with fewer elements keep 32-bit state"
    )


class OptimAdamw8BitPlugin(Plugin[OptimAdamw8BitConfig]):
    """Trains with AdamW, both moments stored in 8 bits, scaled in blocks of 256.

    Two bytes of state per weight instead of eight. Groups and weight decay as in `optim_adamw`.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization";
    `bitsandbytes.optim.AdamW8bit`.
    """

    config_class = OptimAdamw8BitConfig
    name: ClassVar[str] = "optim_adamw8bit"
    slot: ClassVar[str | None] = "optimizer"

    @hookimpl
    def make_optimizer(self, engine: Engine) -> Optimizer:
        """Build the optimizer over the model's parameters, grouped by pattern and weight decay.

        Raises:
            ConfigError: bitsandbytes is not installed, a pattern matches no parameter, or all are
                frozen.
        """
        try:
            from bitsandbytes import optim
        except ImportError as error:
            raise ConfigError(
                f"optim_adamw8bit needs bitsandbytes 0.50 or later, which cannot be imported "
                f"({error}); install it: pip install 'nexus-trainer[adamw8bit]'"
            ) from error
        config = self.config
        make: Any = optim.AdamW8bit  # type: ignore[attr-defined]
        made = make(
            groups_of(engine.model, config, self.name),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            min_8bit_size=config.min_8bit_size,
        )
        return cast(Optimizer, made)
