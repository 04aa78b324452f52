"""Averages the weights over the run, and evaluates with the average."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import CheckpointError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.bases.parallel import local_part

if TYPE_CHECKING:
    from nexus_core import Engine, Snapshot

__all__ = ["EmaConfig", "EmaPlugin"]


class EmaConfig(PluginConfig):
    """Settings of the averaged weights."""

    decay: float = Field(0.999, ge=0, lt=1, description="what the average keeps of itself a step")
    ramp: bool = Field(
        True,
        description="average over fewer steps while there are few: decay is at most (1+n)/(10+n)",
    )
    evaluate: bool = Field(True, description="evaluate with the average instead of the weights")


class EmaPlugin(Plugin[EmaConfig]):
    """Keeps an exponential moving average of the trained weights beside them.

    Training is not changed. Evaluation runs with the average in the model's place, and the
    weights come back bit for bit. The average is kept in float32 at least, is saved with the
    plugin's state, and `weights()` gives it in the names of the model's `state_dict`. Buffers
    (running statistics) are the model's own.

    Source: Polyak and Juditsky 1992; the ramp is that of `tf.train.ExponentialMovingAverage`.
    """

    before: ClassVar[tuple[str, ...]] = ("checkpoint", "early_stop")
    _average: dict[str, Tensor]
    _updates: int
    _live: list[Tensor]
    """The model's parameters, in the order of the average."""
    _put_by: list[Tensor] | None
    """The weights' values while the average stands in their place."""

    def __init__(self, config: EmaConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self._average, self._updates, self._live, self._put_by = {}, 0, [], None

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters, by their names in the model."""
        return dict(self._average)

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Begin with the weights as they are, unless there is an average from before."""
        self._bring_back()
        trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        if not self._average:
            self._average = {name: _wide(p).clone() for name, p in trained.items()}
        if self._average.keys() != trained.keys():
            odd = min(self._average.keys() ^ trained.keys())
            raise CheckpointError(
                f"ema: the saved average and the trained parameters differ, for instance in "
                f"'{odd}'; resume with the config that wrote the checkpoint"
            )
        self._live = list(trained.values())
        self._average = {name: self._fitting(name, p) for name, p in trained.items()}

    @hookimpl
    @torch.no_grad()
    def on_step(self, engine: Engine) -> None:
        """Move the average towards the weights; a refused step leaves it where it is."""
        self._updates += 1
        decay = self.config.decay
        if self.config.ramp:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        average = [local_part(mean) for mean in self._average.values()]
        step = 1 - decay if engine.refused is None else (1 - decay) * (1 - engine.refused)
        weights = [torch.as_tensor(step, dtype=mean.dtype, device=mean.device) for mean in average]
        torch._foreach_lerp_(average, [_wide(local_part(p)) for p in self._live], weights)

    @hookimpl(wrapper=True)
    def forward(self, engine: Engine) -> Generator[None, Any, Any]:
        """Put the average in the model's place at the first batch of an evaluation."""
        if not engine.training and self.config.evaluate and self._put_by is None and self._live:
            self._put_by = [p.detach().clone() for p in self._live]
            self._fill(list(self._average.values()))
        return (yield)

    @hookimpl
    def on_eval(self) -> None:
        """Bring the weights back."""
        self._bring_back()

    @hookimpl
    def on_save(self, snapshot: Snapshot) -> None:
        """Bring the weights back: the snapshot holds the model's tensors in place."""
        self._bring_back()

    @hookimpl
    def on_close(self) -> None:
        """Bring the weights back after an evaluation that failed."""
        self._bring_back()

    def state_dict(self) -> StateDict:
        """The average and how many steps are in it."""
        return {"average": dict(self._average), "updates": self._updates} if self._average else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Take over the average."""
        average = cast(dict[str, Tensor], state["average"])
        self._average = {name: tensor.clone() for name, tensor in average.items()}
        self._updates = int(cast(int, state["updates"]))

    def _fitting(self, name: str, parameter: Tensor) -> Tensor:
        """The average of a parameter, where the parameter is."""
        mean, wide = self._average[name], _wide(parameter)
        if mean.shape != wide.shape or not mean.is_floating_point():
            raise CheckpointError(
                f"ema: the saved average of '{name}' is {tuple(mean.shape)}, {mean.dtype}, the "
                f"parameter {tuple(wide.shape)}; resume with the config that wrote the checkpoint"
            )
        return mean.to(wide.device, wide.dtype)

    def _bring_back(self) -> None:
        if self._put_by is not None:
            self._fill(self._put_by)
            self._put_by = None

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live, values, strict=True):
            parameter.copy_(value)


def _wide(parameter: Tensor) -> Tensor:
    """The values in float32 at least; the parameter's own memory where it is so wide already."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
