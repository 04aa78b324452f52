"""What happens where no plugin answers: the last implementation of every seam."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from nexus_core.errors import CheckpointError, ConfigError, DataError
from nexus_core.loader import Batch
from nexus_core.plugin import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Defaults", "FunctionLossPlugin"]


class Defaults:
    """The core's own answers, asked after every plugin's."""

    @hookimpl(trylast=True)
    def make_data(self) -> NoReturn:
        raise DataError(
            "there is no training data: pass it to fit(...), or add a plugin that makes it "
            "(nexus-plugins list shows those with the slot 'data')"
        )

    @hookimpl(trylast=True)
    def make_model(self) -> NoReturn:
        raise ConfigError(
            "there is no model: pass one to Engine(...), or add a plugin that makes it "
            "(nexus-plugins list shows those with the slot 'model')"
        )

    @hookimpl(trylast=True)
    def make_optimizer(self) -> NoReturn:
        raise ConfigError(
            "there is no optimizer: pass one to Engine(...), or add a plugin that makes it "
            "(nexus-plugins list shows those with the slot 'optimizer')"
        )

    @hookimpl(trylast=True)
    def load_snapshot(self, source: str) -> NoReturn:
        raise CheckpointError(
            f"cannot resume from '{source}': no plugin of this run reads checkpoints; "
            "add one, for instance with --plugins checkpoint"
        )

    @hookimpl(trylast=True)
    def forward(self, engine: Engine, batch: Batch) -> Any:
        """Call the model with what it accepts of a dict, with a tuple's first, or the batch."""
        if isinstance(batch, Mapping):
            return engine.model(**accepted(engine.model, batch))
        return engine.model(batch[0] if isinstance(batch, list | tuple) else batch)

    @hookimpl(trylast=True)
    def weigh_losses(self, engine: Engine, terms: tuple[str, ...]) -> dict[str, float]:
        weights: dict[str, float] = {}
        for weight in engine.hook.loss_weight(engine=engine):
            weights.update(weight)
        return weights

    @hookimpl(trylast=True)
    def backward(self, loss: Tensor) -> bool:
        loss.backward()  # type: ignore[no-untyped-call]
        return True

    @hookimpl(trylast=True)
    def optimizer_step(self, engine: Engine) -> bool:
        engine.optimizer.step()
        return True


class FunctionLossPlugin(Plugin[PluginConfig]):
    """The loss of an embedded engine: a function of model and batch that returns a mean.

    Args:
        function: called as `function(model, batch)`; returns a tensor without dimensions. Each
            micro-batch counts the same; for ragged ones write a `Loss`, which is exact.
    """

    name = "loss"
    after = ()

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self._function = function

    @hookimpl
    def forward(self, engine: Engine, batch: Batch) -> Tensor:
        return self._function(engine.model, batch)

    @hookimpl
    def loss_units(self) -> dict[str, float]:
        return {"loss": 1.0}

    @hookimpl
    def loss_terms(self, output: Tensor) -> dict[str, Tensor]:
        return {"loss": output}


def accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the batch that the model's `forward` has a parameter for."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(batch)
    return {key: value for key, value in batch.items() if key in parameters}
